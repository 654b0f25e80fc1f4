package gemmamtp.core

private const val REPLACEMENT = '\uFFFD'

/** Converts token ids to text; special tokens give theirs if `special` is true, else none. */
internal fun interface Decode {
    fun text(ids: List<Int>, special: Boolean): String
}

/**
 * The text that a token completes.
 *
 * @property text of the answer. It may come with a token of a channel: text that was held back, at the end.
 * @property part what the token belongs to, `answer` or the name of a channel.
 * @property partText of that part; the same as [text] in the answer.
 */
internal class Piece(val text: String, val part: String = ANSWER, val partText: String = "")

/**
 * Decodes tokens as they come, holding back incomplete characters and text that may begin a stop string.
 *
 * Thoughts and other channels are no part of the answer: their tokens give it no text, and are not searched for stop
 * strings. Each channel that was opened is in [channels].
 *
 * @param decode converts token ids to text.
 * @param stop strings that end the text.
 * @param tracker tells which part each token belongs to.
 * @param parts what each channel has around its content, by its name.
 */
internal class TextStream(
    private val decode: Decode,
    private val stop: List<String> = emptyList(),
    private val tracker: PartTracker = PartTracker(emptyMap()),
    private val parts: Map<String, PartForm> = emptyMap(),
) {
    private val answer = Decoding(decode, special = false)
    private val opened = ArrayList<Channel>()
    private var count = 0
    private var possibleStop = "" // complete characters that may begin a stop string

    /** Whether a stop string came. */
    var stopped = false
        private set

    /** What was opened, in order; the last may still be open. */
    val channels: List<Channel> get() = opened

    init {
        tracker.channel?.let { name ->
            val channel = open(name)
            for (token in tracker.opened) channel.add(token, last = false) // what the prompt wrote in it is no new text
            channel.forget()
        }
    }

    /**
     * The text that a token completes, which may be empty.
     *
     * A stop string sets [stopped]; neither it nor anything after it is returned.
     *
     * @param last whether it is the text's last token; then all remaining text is returned.
     */
    fun add(token: Int, last: Boolean = false): Piece {
        val wasOpen = tracker.channel != null
        val (part, isMark) = tracker.add(token)
        count++
        if (part == ANSWER) {
            val text = withoutStop(answer.add(token, last), last)
            return Piece(text, ANSWER, text)
        }
        val text = if (last) flush() else ""
        if (isMark && !wasOpen) {
            if (tracker.channel != null) open(part) // else a mark that ends what is not open
            return Piece(text, part)
        }
        return Piece(text, part, if (isMark) opened.last().close() else opened.last().add(token, last))
    }

    /** The answer's remaining text at the end, incomplete characters included. */
    fun flush(): String = withoutStop(answer.flush(), last = true)

    private fun open(name: String): Channel {
        // A call is parsed as a whole, with the special tokens around its texts.
        val isCall = name == TOOL_CALL
        val form = if (isCall) PartForm() else parts[name] ?: PartForm()
        return Channel(name, count - 1, Decoding(decode, special = isCall), form).also(opened::add)
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
        val longest = if (last) 0 else stop.maxOfOrNull { overlap(text, it.dropLast(1)) } ?: 0
        possibleStop = text.substring(text.length - longest)
        return text.substring(0, text.length - longest)
    }
}

/**
 * What a channel holds, without what the template writes around it.
 *
 * @property name `thought`, `tool_call` or another.
 * @property start index of the token that opened it, counted from the first new one; -1 for one of the prompt.
 * @param form what is left out at its beginning and end.
 */
internal class Channel internal constructor(
    val name: String,
    val start: Int,
    private val decoding: Decoding,
    form: PartForm,
) {
    private var before = form.before
    private val after = form.after
    private var held = ""
    private val given = StringBuilder()

    /** Its text so far. */
    val text: String get() = given.toString()

    /** Whether the token that ends it came. */
    var closed = false
        private set

    /** The text that a token inside the channel completes. */
    internal fun add(token: Int, last: Boolean): String = give(held + decoding.add(token, last), last)

    /** The remaining text at the token that ends the channel. */
    internal fun close(): String {
        closed = true
        return give(held + decoding.flush(), last = true)
    }

    internal fun forget() = given.setLength(0)

    private fun give(new: String, last: Boolean): String {
        var text = new
        if (before.isNotEmpty()) {
            if (!last && text.length < before.length && before.startsWith(text)) {
                held = text
                return ""
            }
            text = text.removePrefix(before)
            before = ""
        }
        val kept = if (last) 0 else overlap(text, after)
        held = text.substring(text.length - kept)
        return (if (closed) text.removeSuffix(after) else text.substring(0, text.length - kept)).also(given::append)
    }
}

/** Tokens of one part, decoded as they come. */
internal class Decoding(private val decode: Decode, private val special: Boolean) {
    // Tokens whose text was returned, then those whose text was not; older ones are no longer needed as context.
    private var returned = emptyList<Int>()
    private var held = emptyList<Int>()

    /** The text that a token completes; nothing while it ends inside a character, unless it is the last. */
    fun add(token: Int, last: Boolean): String {
        held = held + token
        val new = pending()
        if (new.endsWith(REPLACEMENT) && !last) return ""
        returned = held
        held = emptyList()
        return new
    }

    /** The remaining text, incomplete characters included. */
    fun flush(): String {
        val new = pending()
        returned = held.ifEmpty { returned }
        held = emptyList()
        return new
    }

    private fun pending(): String {
        val before = decode.text(returned, special)
        val text = decode.text(returned + held, special)
        if (text.startsWith(before)) return text.substring(before.length)
        // Later bytes can break what was a character; then code points are counted, as in Python, not UTF-16 units.
        val count = before.codePointCount(0, before.length)
        return if (count >= text.codePointCount(0, text.length)) "" else text.substring(text.offsetByCodePoints(0, count))
    }
}

/** How many characters at the end of a text begin another. */
private fun overlap(text: String, other: String): Int =
    (minOf(other.length, text.length) downTo 1).firstOrNull { text.endsWith(other.substring(0, it)) } ?: 0
