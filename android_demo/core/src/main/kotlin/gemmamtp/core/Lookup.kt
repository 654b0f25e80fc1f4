package gemmamtp.core

/** Tokens that must agree; agreement beyond the second number says no more. */
private const val SHORTEST = 2
private const val LONGEST = 16

/**
 * Draft tokens that cost nothing: what followed the newest tokens where they stood before.
 *
 * Prompt lookup decoding (Saxena 2023).
 */
class Lookup {
    private val text = ArrayList<Int>()
    private val after = HashMap<List<Int>, Int>()

    /** How many of the newest tokens stood together before, and what followed them there. */
    class Found(val agreeing: Int, val tokens: List<Int>)

    /** Add tokens to the text. */
    fun extend(tokens: List<Int>) {
        for (token in tokens) {
            // Only now is it known what follows: so the newest tokens never find themselves.
            after[text.takeLast(SHORTEST)] = text.size
            text.add(token)
        }
    }

    /**
     * What followed the newest tokens, up to [most] tokens.
     *
     * Where what followed reaches the end of the text, it goes round: a text that repeats itself goes on doing so.
     */
    fun find(most: Int): Found {
        val start = if (text.size > SHORTEST) after[text.takeLast(SHORTEST)] else null
        if (start == null) return Found(0, emptyList())
        val period = text.size - start
        var agreeing = SHORTEST
        while (agreeing < minOf(LONGEST, start) && text[start - 1 - agreeing] == text[text.size - 1 - agreeing]) agreeing++
        return Found(agreeing, List(most) { text[start + it % period] })
    }
}
