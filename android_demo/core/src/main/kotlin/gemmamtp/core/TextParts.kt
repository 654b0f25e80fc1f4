package gemmamtp.core

/** The part of a text that is shown to the user; the others are channels that a bundle may name. */
public const val ANSWER: String = "answer"

/** What the model thinks before it answers. */
public const val THOUGHT: String = "thought"

/** A call of a tool. */
public const val TOOL_CALL: String = "tool_call"

/**
 * What a channel has around its content, and how calls of tools are written. FORMAT.md, "Channels", says what it means.
 *
 * @property before text that is left out where the channel begins with it.
 * @property after text that is left out where the channel ends with it.
 * @property syntax of calls, `pairs` or `json`; empty if the bundle does not say.
 * @property quote the text before and after each text in a call.
 */
internal class PartForm(val before: String = "", val after: String = "", val syntax: String = "", val quote: String = "")

/**
 * Follows the marks of channels from token to token.
 *
 * @param channels ids of the tokens that begin and end each channel, by its name.
 * @param eos ids of the tokens that end a turn: marks before the last of them in the prompt do not count.
 * @param prompt token ids before the text. It begins inside a channel if they open one and do not close it.
 */
internal class PartTracker(
    private val channels: Map<String, Pair<Int, Int>>,
    eos: Set<Int> = emptySet(),
    prompt: List<Int> = emptyList(),
) {
    private val begins = channels.entries.associate { (name, marks) -> marks.first to name }
    private val ends = channels.entries.associate { (name, marks) -> marks.second to name }
    private val endOf = channels.mapValues { (_, marks) -> marks.second }

    /** Name of the channel that the last token left open; null in the answer. */
    var channel: String? = null
        private set

    /** Tokens of the prompt after the mark that opened a channel there; empty if none is open. */
    var opened: List<Int>
        private set

    init {
        val turn = prompt.takeLastWhile { it !in eos }
        val lastMark = turn.indexOfLast { it in begins || it in ends }
        channel = turn.getOrNull(lastMark)?.let(begins::get)
        opened = if (channel == null) emptyList() else turn.drop(lastMark + 1)
    }

    /** A tracker that goes on from here by itself. */
    fun copy() = PartTracker(channels).also {
        it.channel = channel
        it.opened = opened
    }

    /**
     * The part that the next token belongs to, and whether it is a mark of that part. A mark that ends a channel where none
     * is open belongs to that channel.
     */
    fun add(token: Int): Pair<String, Boolean> {
        val open = channel
        if (open == null) {
            channel = begins[token]
            val name = channel ?: ends[token]
            return if (name == null) ANSWER to false else name to true
        }
        val closed = token == endOf[open]
        if (closed) channel = null
        return open to closed
    }
}
