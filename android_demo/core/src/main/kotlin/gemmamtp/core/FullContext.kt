package gemmamtp.core

/** What happens where prompt and answer fill the context. */
public enum class WhenFull {
    /** The text ends; a chat whose prompt does not fit is refused. */
    STOP,

    /**
     * It goes on: a chat without its oldest turns, a text without its oldest tokens but the first. What stays, at most half
     * of the context where it can, is run again.
     */
    SHIFT,
}

/** What stays where a text fills the context. */
internal interface FullContext {
    /** How many messages after the system prompt are left out. */
    val droppedMessages: Int

    /** The tokens that stay, given the new ones so far; null if the text must end. */
    fun shift(answer: List<Int>): List<Int>?
}

/** What stays of a text: its first token, and the newest ones, up to half of the context. */
internal class TextShift(private val prompt: List<Int>, maxSeqLen: Int) : FullContext {
    private val half = maxSeqLen / 2
    override val droppedMessages = 0

    override fun shift(answer: List<Int>): List<Int>? =
        if (half > 1) prompt.take(1) + (prompt + answer).takeLast(half - 1) else null
}

/**
 * What stays of a chat: its system prompt and the newest turns.
 *
 * A turn is a message of the user and all up to the next one, calls of tools and their answers among them; the newest turn
 * always stays. As few turns are left out as make the rest fit into half of the context: leaving out one at a time would run
 * nearly all again in each turn.
 *
 * @param encode the token ids of the prompt that asks for an answer to the last of some messages.
 */
internal class ChatShift(
    private val messages: List<Message>,
    private val maxSeqLen: Int,
    private val encode: (List<Message>) -> List<Int>,
) : FullContext {
    private val system = if (messages.first().role in listOf("system", "developer")) 1 else 0

    // Where the turns begin.
    private val starts = listOf(system) + messages.indices.filter { it > system && messages[it].role == "user" }
    private var first = 0 // turn that is not left out

    override val droppedMessages get() = starts[first] - system

    /**
     * The prompt of all messages, or of those that fit if it leaves no room for an answer; too long if the newest turn alone
     * does not fit.
     *
     * Of the prompts that fit, down to the first that takes half of the context, it is the one with the fewest tokens to run:
     * what an earlier turn left out stays left out.
     *
     * @param reusable how many of a prompt's first tokens need not be run.
     * @throws InputError a prompt cannot be made.
     */
    fun begin(reusable: (List<Int>) -> Int): List<Int> {
        val whole = prompt(0)
        if (whole.size < maxSeqLen) return whole
        val prompts = (firstWithin(maxSeqLen - 1)..firstWithin(maxSeqLen / 2)).associateWith(::prompt)
        first = prompts.keys.minBy { prompts.getValue(it).size - reusable(prompts.getValue(it)) }
        return prompts.getValue(first)
    }

    override fun shift(answer: List<Int>): List<Int>? {
        if (first == starts.lastIndex) return null
        val turn: Int
        val stays: List<Int>
        try {
            turn = firstWithin(maxSeqLen / 2 - answer.size, first + 1)
            stays = prompt(turn) + answer
        } catch (_: InputError) { // the template refuses the rest
            return null
        }
        if (stays.size >= maxSeqLen) return null
        first = turn
        return stays
    }

    private fun prompt(turn: Int) = encode(messages.take(system) + messages.drop(starts[turn]))

    /** The first turn, from [least] on, from which on the prompt has at most [count] tokens; else the newest. */
    private fun firstWithin(count: Int, least: Int = 0): Int {
        var from = least
        var to = starts.lastIndex
        while (from < to) {
            val middle = (from + to) / 2
            if (prompt(middle).size <= count) to = middle else from = middle + 1
        }
        return to
    }
}
