package gemmamtp.core

/**
 * The outcome of one round, or of the prefill, which is a round without drafts.
 *
 * @property drafts the K draft tokens that were proposed.
 * @property accepted how many of them were accepted, 0 to K.
 * @property tokens token ids that the round adds to the text: the accepted drafts and the bonus token.
 * @property logprobs log-probabilities of [tokens], as [logProbability] defines them.
 */
class Round(val drafts: List<Int>, val accepted: Int, val tokens: List<Int>, val logprobs: List<Double>) {
    /** The round with only its first tokens; an accepted draft that is cut off counts as not accepted. */
    fun cut(count: Int) = Round(drafts, minOf(accepted, count), tokens.take(count), logprobs.take(count))
}

/** Length of the longest common prefix of two lists: the shorter length if one of them continues the other. */
fun commonPrefix(one: List<Int>, other: List<Int>): Int {
    val shorter = minOf(one.size, other.size)
    return (0 until shorter).firstOrNull { one[it] != other[it] } ?: shorter
}

/**
 * How many drafts are accepted: the longest prefix that equals the target's own choices.
 *
 * @param drafts K draft tokens.
 * @param choices the target's K+1 choices: after the last token of the text, after the first draft, and so on. The round
 *     adds the accepted ones and the bonus token, `choices.take(accepted + 1)`.
 */
fun accept(drafts: List<Int>, choices: List<Int>): Int = commonPrefix(drafts, choices)
