package gemmamtp.core

/**
 * Counts a text's tokens in thoughts, ends a thought that has as many as it may, and allows none after it.
 *
 * @param tracker of this limit alone, before the text's first token.
 * @param marks ids of the tokens that begin and end a thought.
 * @param maxTokens of all thoughts of the text together, without their marks.
 */
internal class ThoughtLimit(private val tracker: PartTracker, private val marks: Pair<Int, Int>, maxTokens: Int) {
    private var left = maxTokens

    /** The token that must come next: the end of a thought that has as many tokens as it may; null for any. */
    val forced: Int? get() = if (tracker.channel == THOUGHT && left <= 0) marks.second else null

    /** The token that must not come next: the beginning of a thought that may have no token; null for none. */
    val forbidden: Int? get() = if (tracker.channel == null && left <= 0) marks.first else null

    /** Whether a token may come next. */
    fun allows(token: Int) = (forced ?: token) == token && token != forbidden

    /** Go on by the text's next token. */
    fun commit(token: Int) {
        val (part, isMark) = tracker.add(token)
        if (part == THOUGHT && !isMark) left -= 1
    }

    /** How many of the drafts may come next, in their order. */
    fun numAllowed(drafts: List<Int>): Int {
        val ahead = ThoughtLimit(tracker.copy(), marks, left)
        for ((i, token) in drafts.withIndex()) {
            if (!ahead.allows(token)) return i
            ahead.commit(token)
        }
        return drafts.size
    }
}
