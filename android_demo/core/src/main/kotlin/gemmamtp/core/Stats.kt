package gemmamtp.core

import java.util.TreeMap

/** Rounds whose drafts came from one source. */
class Sourced {
    var rounds = 0
    var drafted = 0
    var accepted = 0
}

/**
 * Counts of one generation. Drafts after an end token or past the budget count as drafted, not as accepted.
 *
 * @property draftedLengths rounds by their number of drafts.
 * @property sources rounds by who made the drafts, if there were any.
 * @property lastDrafted drafts of the newest round.
 */
class Stats {
    var rounds = 0
    var drafted = 0
    var accepted = 0
    val draftedByPosition = ArrayList<Int>()
    val acceptedByPosition = ArrayList<Int>()
    val draftedLengths = TreeMap<Int, Int>()
    val sources = LinkedHashMap<String, Sourced>()
    var lastDrafted = 0
    var reusedTokens = 0
    var prefillSeconds = 0.0
    var decodeSeconds = 0.0
    var finishReason = ""

    /** Count a round. */
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
        val ofSource = sources.getOrPut(source) { Sourced() }
        ofSource.rounds += 1
        ofSource.drafted += lastDrafted
        ofSource.accepted += done.accepted
    }

    /** Accepted drafts over proposed drafts, null if nothing was drafted. */
    val acceptanceRate: Double? get() = if (drafted > 0) accepted.toDouble() / drafted else null

    /** 1 + accepted / rounds, null without a round. */
    val meanTokensPerRound: Double? get() = if (rounds > 0) 1 + accepted.toDouble() / rounds else null
}
