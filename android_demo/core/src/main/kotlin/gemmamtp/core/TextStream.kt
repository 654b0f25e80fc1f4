package gemmamtp.core

private const val REPLACEMENT = '\uFFFD'

/**
 * Decodes tokens as they come, holding back incomplete characters and text that may begin a stop string.
 *
 * Thoughts and other channels are no part of it: their tokens give no text, and are not searched for stop strings.
 *
 * @param decode converts token ids to text.
 * @param stop strings that end the text.
 * @param channels ids of the tokens that begin and end each channel.
 * @param prompt token ids before the text, of its own turn.
 */
class TextStream(
    private val decode: (List<Int>) -> String,
    private val stop: List<String> = emptyList(),
    channels: Collection<Pair<Int, Int>> = emptyList(),
    prompt: List<Int> = emptyList(),
) {
    private val ends = channels.toMap()
    private val marks = ends.keys + ends.values
    private var until = ends[prompt.lastOrNull { it in marks }] // what ends the channel, inside one

    // Tokens whose text was returned, then those whose text was not; older ones are no longer needed as context.
    private var returned = emptyList<Int>()
    private var held = emptyList<Int>()
    private var possibleStop = "" // complete characters that may begin a stop string

    /** Whether a stop string came. */
    var stopped = false
        private set

    /**
     * The text that a token completes, which may be empty.
     *
     * A stop string sets [stopped]; neither it nor anything after it is returned.
     *
     * @param last whether it is the text's last token; then all remaining text is returned.
     */
    fun add(token: Int, last: Boolean = false): String {
        if (isOutside(token)) return if (last) flush() else ""
        held = held + token
        var new = pending()
        if (new.endsWith(REPLACEMENT) && !last) {
            new = ""
        } else {
            returned = held
            held = emptyList()
        }
        return withoutStop(new, last)
    }

    /** The remaining text at the end, incomplete characters included. */
    fun flush(): String {
        val new = pending()
        returned = held.ifEmpty { returned }
        held = emptyList()
        return withoutStop(new, last = true)
    }

    /** Whether a token is no part of the answer: a mark of a channel, or inside one. */
    private fun isOutside(token: Int): Boolean {
        if (until == null) {
            until = ends[token]
            return token in marks
        }
        if (token == until) until = null
        return true
    }

    private fun pending(): String {
        val before = decode(returned)
        val text = decode(returned + held)
        if (text.startsWith(before)) return text.substring(before.length)
        // Later bytes can break what was a character; then code points are counted, as in Python, not UTF-16 units.
        val count = before.codePointCount(0, before.length)
        return if (count >= text.codePointCount(0, text.length)) "" else text.substring(text.offsetByCodePoints(0, count))
    }

    /** The new text up to a stop string, or up to characters that may begin one. */
    private fun withoutStop(new: String, last: Boolean): String {
        val text = possibleStop + new
        val ends = stop.map { text.indexOf(it) }.filter { it >= 0 }
        if (stopped || ends.isNotEmpty()) {
            stopped = true
            possibleStop = ""
            return text.substring(0, ends.minOrNull() ?: 0)
        }
        val longest = if (last) 0 else stop.maxOfOrNull { stopPrefix(it, text) } ?: 0
        possibleStop = text.substring(text.length - longest)
        return text.substring(0, text.length - longest)
    }
}

/** How many characters at the end of a text begin a stop string. */
private fun stopPrefix(stop: String, text: String): Int =
    (minOf(stop.length - 1, text.length) downTo 1).firstOrNull { text.endsWith(stop.substring(0, it)) } ?: 0
