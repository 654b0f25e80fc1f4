package gemmamtp.demo

/** What the session is busy with. */
enum class Phase { IDLE, COPYING, OPENING, READY, WRITING, BENCHMARKING }

/** How many drafts a round has: none, the bundle's default, or as many as pay. */
enum class Drafting { OFF, ON, AUTO }

/** A prompt and what was written after it, so far. */
data class Exchange(val prompt: String, val answer: String)

/** How far something long is, in bytes or turns. */
data class Work(val step: Step, val done: Long, val total: Long)

enum class Step { COPYING, CHECKING, LOADING, MEASURING }

/** Told how far something long is; may throw [Stopped]. */
fun interface Report {
    fun at(work: Work)
}

/** The user, or the system, wants no more of this. */
class Stopped : Exception()

/** Why something did not happen. */
sealed class Problem {
    /** The one line of an InputError. */
    data class Refused(val line: String) : Problem()

    /** The bundle was not opened, because it needs more bytes than the system can give without pressure. */
    data class MemoryShort(val needed: Long, val available: Long) : Problem()

    /** Memory ran out; the bundle was closed. */
    data object OutOfMemory : Problem()

    /** The system asked for memory while the app was in view. */
    data object StoppedForMemory : Problem()

    /** The system asked for memory while the app was not in view; it need not be short for that. */
    data object ClosedForMemory : Problem()
}

/** All that the activity shows. */
data class Screen(
    val phase: Phase = Phase.IDLE,
    val bundle: String? = null,
    val chats: Boolean = false,
    val drafting: Drafting = Drafting.AUTO,
    val talk: List<Exchange> = emptyList(),
    val counts: Counts? = null,
    val work: Work? = null,
    val comparison: Comparison? = null,
    val problem: Problem? = null,
) {
    val busy: Boolean get() = phase != Phase.IDLE && phase != Phase.READY
    val ready: Boolean get() = phase == Phase.READY

    /** Whether the bundle that was asked for last may do better if it is asked for again. */
    val canReopen: Boolean
        get() = phase == Phase.IDLE &&
            (problem is Problem.MemoryShort || problem == Problem.OutOfMemory || problem == Problem.ClosedForMemory)
}
