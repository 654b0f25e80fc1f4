package gemmamtp.core

/**
 * The outcome of one round, or of the prefill, which is a round without drafts.
 *
 * @property drafts the K draft tokens that were proposed.
 * @property accepted how many of them were accepted, 0 to K.
 * @property tokens token ids that the round adds to the text: the accepted drafts and the bonus token.
 * @property logprobs log-probabilities of [tokens], as [logProbability] defines them.
 */
public class Round internal constructor(
    public val drafts: List<Int>,
    public val accepted: Int,
    public val tokens: List<Int>,
    public val logprobs: List<Double>,
) {
    /** The round with only its first tokens; an accepted draft that is cut off counts as not accepted. */
    internal fun cut(count: Int) = Round(drafts, minOf(accepted, count), tokens.take(count), logprobs.take(count))
}

/** Length of the longest common prefix of two lists: the shorter length if one of them continues the other. */
internal fun commonPrefix(one: List<Int>, other: List<Int>): Int {
    val shorter = minOf(one.size, other.size)
    return (0 until shorter).firstOrNull { one[it] != other[it] } ?: shorter
}

/**
 * The tokens that a round adds: the longest prefix of the drafts that equals the target's own choices, and one more.
 *
 * @param drafts K draft tokens.
 * @param choices the target's K+1 choices: after the last token of the text, after the first draft, and so on. None is
 *     taken after the first that is no draft, so what chooses them sees the tokens of the text and no others.
 */
internal fun accept(drafts: List<Int>, choices: Sequence<Int>): List<Int> {
    val tokens = ArrayList<Int>()
    for (choice in choices) {
        tokens.add(choice)
        if (tokens.size > drafts.size || drafts[tokens.lastIndex] != choice) break
    }
    return tokens
}
