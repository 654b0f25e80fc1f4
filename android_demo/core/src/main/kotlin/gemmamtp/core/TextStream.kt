package gemmamtp.core

private const val REPLACEMENT = '\uFFFD'

/** Turns tokens into text as they come, holding back incomplete characters and what may become a stop string. */
class TextStream(private val decode: (List<Int>) -> String, private val stop: List<String> = emptyList()) {
    // Tokens whose text was given out, then those whose text was not; older ones are no longer needed as context.
    private var given = emptyList<Int>()
    private var held = emptyList<Int>()
    private var maybe = "" // complete characters that may begin a stop string

    /** A stop string came. */
    var stopped = false
        private set

    /**
     * The text that this token completes, possibly none; after the [last] token of a text all that is left.
     *
     * A stop string sets [stopped], and neither it nor anything after it is given out.
     */
    fun add(token: Int, last: Boolean = false): String {
        held = held + token
        var found = pending()
        if (found.endsWith(REPLACEMENT) && !last) {
            found = ""
        } else {
            given = held
            held = emptyList()
        }
        return withoutStop(found, last)
    }

    /** The rest, at the end of a text, incomplete characters included. */
    fun flush(): String {
        val found = pending()
        given = held.ifEmpty { given }
        held = emptyList()
        return withoutStop(found, last = true)
    }

    private fun pending(): String {
        val before = decode(given)
        val text = decode(given + held)
        if (text.startsWith(before)) return text.substring(before.length)
        // Bytes that came later can break what was a character: then characters count, not their halves in UTF-16.
        val count = before.codePointCount(0, before.length)
        return if (count >= text.codePointCount(0, text.length)) "" else text.substring(text.offsetByCodePoints(0, count))
    }

    private fun withoutStop(found: String, last: Boolean): String {
        val text = maybe + found
        val ends = stop.map { text.indexOf(it) }.filter { it >= 0 }
        if (stopped || ends.isNotEmpty()) {
            stopped = true
            maybe = ""
            return text.substring(0, ends.minOrNull() ?: 0)
        }
        val longest = if (last) 0 else stop.maxOfOrNull { begun(it, text) } ?: 0
        maybe = text.substring(text.length - longest)
        return text.substring(0, text.length - longest)
    }
}

/** How many characters at the end of a text begin a stop string. */
private fun begun(stop: String, text: String): Int =
    (minOf(stop.length - 1, text.length) downTo 1).firstOrNull { text.endsWith(stop.substring(0, it)) } ?: 0
