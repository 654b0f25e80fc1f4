package gemmamtp.core

/**
 * Counts a text's tokens in thoughts, and ends a thought that has as many as it may.
 *
 * @param tracker of this limit alone, before the text's first token.
 * @property end id of the token that ends a thought.
 * @param maxTokens of all thoughts of the text together, without their marks.
 */
class ThoughtLimit(private val tracker: PartTracker, val end: Int, maxTokens: Int) {
    private var left = maxTokens

    /** The token that must come next: the end of a thought that has as many tokens as it may; null for any. */
    val forced: Int? get() = if (tracker.channel == THOUGHT && left <= 0) end else null

    /** Go on by the text's next token. */
    fun commit(token: Int) {
        val (part, isMark) = tracker.add(token)
        if (part == THOUGHT && !isMark) left -= 1
    }

    /** How many of the drafts may come next, in their order. */
    fun numAllowed(drafts: List<Int>): Int {
        val ahead = ThoughtLimit(tracker.copy(), end, left)
        for ((i, token) in drafts.withIndex()) {
            if ((ahead.forced ?: token) != token) return i
            ahead.commit(token)
        }
        return drafts.size
    }
}
