package gemmamtp.core

/**
 * What one round did: the drafts proposed, how many were accepted, and the tokens it adds to the text.
 *
 * @property logprobs those tokens' log-probabilities, as [logProbability] defines them.
 */
class Round(val drafts: List<Int>, val accepted: Int, val tokens: List<Int>, val logprobs: List<Double>) {
    /** The same round with only its first tokens; an accepted draft that is cut off counts as not accepted. */
    fun cut(count: Int) = Round(drafts, minOf(accepted, count), tokens.take(count), logprobs.take(count))
}

/**
 * How many drafts are accepted: the longest prefix that equals the target's own choices.
 *
 * @param choices the target's K+1 choices: after `last`, after the first draft, and so on. The round adds the accepted
 *     ones and the bonus token, `choices.take(accepted + 1)`.
 */
fun accept(drafts: List<Int>, choices: List<Int>): Int =
    drafts.indices.firstOrNull { drafts[it] != choices[it] } ?: drafts.size
