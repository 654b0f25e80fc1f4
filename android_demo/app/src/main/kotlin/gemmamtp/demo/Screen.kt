package gemmamtp.demo

/** What the session is doing. */
enum class Phase { IDLE, COPYING, OPENING, READY, WRITING, BENCHMARKING }

/** How many drafts a round has: none, the bundle's default, or the fastest number for each round. */
enum class Drafting { OFF, ON, AUTO }

/** A prompt, and the answer and the thoughts before it so far. */
data class Exchange(val prompt: String, val answer: String, val thought: String = "")

/** Progress of a [step]: [done] of [total] bytes or turns. */
data class Work(val step: Step, val done: Long, val total: Long)

/** The steps of long work. */
enum class Step { COPYING, DOWNLOADING, CHECKING, LOADING, MEASURING }

/** Receives the progress of long work. */
fun interface Report {
    /** Called with the progress; throws [Stopped] to end the work. */
    fun at(work: Work)
}

/** Thrown to end work that the user or the system stopped. */
class Stopped : Exception()

/** Why a request was not carried out. */
sealed class Problem {
    /** The message of an InputError. */
    data class Refused(val line: String) : Problem()

    /** The bundle was not opened, because it needs more bytes than are available. */
    data class MemoryShort(val needed: Long, val available: Long) : Problem()

    /** Something failed that no message explains, in the words of its error; the bundle was closed. */
    data class Failed(val line: String) : Problem()

    /** Memory ran out; the bundle was closed. */
    data object OutOfMemory : Problem()

    /** The system had little memory left, so generating was stopped. */
    data object StoppedForMemory : Problem()

    /** The system asked for memory while the app was not in view, so the bundle was closed. */
    data object ClosedForMemory : Problem()
}

/**
 * Everything that the activity shows.
 *
 * @property chats whether the open bundle answers conversations; otherwise it continues texts.
 * @property thinks whether it can be asked to think.
 * @property system what each conversation begins with; empty for nothing.
 * @property thinking whether the model is to think before it answers, if it can.
 */
data class Screen(
    val phase: Phase = Phase.IDLE,
    val bundle: String? = null,
    val chats: Boolean = false,
    val thinks: Boolean = false,
    val system: String = "",
    val thinking: Boolean = false,
    val drafting: Drafting = Drafting.AUTO,
    val talk: List<Exchange> = emptyList(),
    val counts: Counts? = null,
    val work: Work? = null,
    val comparison: Comparison? = null,
    val problem: Problem? = null,
) {
    val busy: Boolean get() = phase != Phase.IDLE && phase != Phase.READY
    val ready: Boolean get() = phase == Phase.READY

    /** Whether opening the same bundle again may succeed. */
    val canReopen: Boolean
        get() = phase == Phase.IDLE &&
            (problem is Problem.MemoryShort || problem is Problem.Failed || problem == Problem.OutOfMemory ||
                problem == Problem.ClosedForMemory)
}
