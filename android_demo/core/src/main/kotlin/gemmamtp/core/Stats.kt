package gemmamtp.core

import java.util.TreeMap

/**
 * Counts of the rounds whose drafts came from one source.
 *
 * @property rounds rounds with drafts of this source.
 * @property drafted draft tokens that it proposed.
 * @property accepted how many of them were accepted.
 */
class SourceStats {
    var rounds = 0
    var drafted = 0
    var accepted = 0
}

/**
 * Counts and times of one generation.
 *
 * Drafts after an end token or past the budget count as drafted, not as accepted.
 *
 * @property rounds rounds, without the prefill.
 * @property drafted draft tokens of all rounds.
 * @property accepted how many of them were accepted.
 * @property draftedByPosition draft tokens by their position in the round.
 * @property acceptedByPosition accepted drafts by their position in the round.
 * @property draftedLengths rounds by their number of drafts.
 * @property sources counts by the source of drafts, of rounds that had drafts.
 * @property lastDrafted drafts of the newest round.
 * @property reusedTokens tokens of the prompt that were in the cache already.
 * @property prefillSeconds time of the prefill.
 * @property decodeSeconds time of all rounds.
 * @property finishReason `eos`, `length`, `max_seq_len`, `stop` or `cancelled`; empty while text is generated.
 */
class Stats {
    var rounds = 0
    var drafted = 0
    var accepted = 0
    val draftedByPosition = ArrayList<Int>()
    val acceptedByPosition = ArrayList<Int>()
    val draftedLengths = TreeMap<Int, Int>()
    val sources = LinkedHashMap<String, SourceStats>()
    var lastDrafted = 0
    var reusedTokens = 0
    var prefillSeconds = 0.0
    var decodeSeconds = 0.0
    var finishReason = ""

    /** Add a round, cut off where the text ends, and the [source] of its drafts. */
    fun add(done: Round, source: String) {
        lastDrafted = done.drafts.size
        rounds += 1
        drafted += lastDrafted
        accepted += done.accepted
        draftedLengths[lastDrafted] = (draftedLengths[lastDrafted] ?: 0) + 1
        for ((counts, upTo) in listOf(draftedByPosition to lastDrafted, acceptedByPosition to done.accepted)) {
            while (counts.size < lastDrafted) counts.add(0)
            for (i in 0 until upTo) counts[i] += 1
        }
        if (lastDrafted == 0) return
        val ofSource = sources.getOrPut(source) { SourceStats() }
        ofSource.rounds += 1
        ofSource.drafted += lastDrafted
        ofSource.accepted += done.accepted
    }

    /** Accepted drafts / proposed drafts; null if nothing was drafted. */
    val acceptanceRate: Double? get() = if (drafted > 0) accepted.toDouble() / drafted else null

    /** 1 + accepted / rounds; null without a round. */
    val meanTokensPerRound: Double? get() = if (rounds > 0) 1 + accepted.toDouble() / rounds else null
}
