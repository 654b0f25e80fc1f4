package gemmamtp.core

/** Tokens that must match. */
private const val MIN_MATCH_TOKENS = 2

/** A longer match is no better sign. */
private const val MAX_MATCH_TOKENS = 16

/**
 * Prompt lookup: draft tokens copied from where the newest tokens occurred before in the text.
 *
 * Prompt lookup decoding (Saxena 2023). Such drafts take no time to make.
 */
internal class Lookup {
    private val text = ArrayList<Int>()
    private val after = HashMap<List<Int>, Int>()

    /**
     * What a lookup gives.
     *
     * @property matching how many of the newest tokens match, at most [MAX_MATCH_TOKENS]; 0 if too few do.
     * @property tokens copied token ids, none if too few match.
     */
    class Match(val matching: Int, val tokens: List<Int>)

    /** Append tokens to the text. */
    fun extend(tokens: List<Int>) {
        for (token in tokens) {
            // A run is entered once its follower is known, so the newest tokens never match themselves.
            after[text.takeLast(MIN_MATCH_TOKENS)] = text.size
            text.add(token)
        }
    }

    /**
     * Copy [maxTokens] tokens that followed the newest tokens where they occurred last.
     *
     * A copy that reaches the end of the text goes on with its own beginning: a text that repeats itself is expected to
     * continue so.
     */
    fun find(maxTokens: Int): Match {
        val start = if (text.size > MIN_MATCH_TOKENS) after[text.takeLast(MIN_MATCH_TOKENS)] else null
        if (start == null) return Match(0, emptyList())
        val period = text.size - start
        val longest = minOf(MAX_MATCH_TOKENS, start)
        var matching = MIN_MATCH_TOKENS
        while (matching < longest && text[start - 1 - matching] == text[text.size - 1 - matching]) matching++
        return Match(matching, List(maxTokens) { text[start + it % period] })
    }
}
