package gemmamtp.core

import java.util.TreeMap

/**
 * Counts of the rounds whose drafts came from one source.
 *
 * @property rounds rounds with drafts of this source.
 * @property drafted draft tokens that it proposed.
 * @property accepted how many of them were accepted.
 */
public class SourceStats internal constructor() {
    public var rounds: Int = 0
        internal set
    public var drafted: Int = 0
        internal set
    public var accepted: Int = 0
        internal set
}

/**
 * Counts and times of one generation.
 *
 * Only tokens that were given out count: drafts after them, for instance after an end token or a stop string, count as
 * drafted, not as accepted.
 *
 * @property rounds rounds, without the prefill.
 * @property tokens tokens that the rounds gave out.
 * @property drafted draft tokens of all rounds.
 * @property accepted how many of them were accepted.
 * @property draftedByPosition draft tokens by their position in the round.
 * @property acceptedByPosition accepted drafts by their position in the round.
 * @property draftedLengths rounds by their number of drafts.
 * @property sources counts by the source of drafts, of rounds that had drafts.
 * @property lastDrafted drafts of the newest round.
 * @property reusedTokens tokens of the prompt that were in the cache already.
 * @property droppedTokens tokens of prompt and answer that were left out because the context was full.
 * @property prefillSeconds time of the prefill, of what was run again because the context was full, and of what other
 *     conversations ran between their chunks.
 * @property decodeSeconds time of all rounds.
 * @property finishReason `eos`, `length`, `max_seq_len`, `stop` or `cancelled`; empty while text is generated.
 */
public class Stats internal constructor() {
    public var rounds: Int = 0
        internal set
    public var tokens: Int = 0
        internal set
    public var drafted: Int = 0
        internal set
    public var accepted: Int = 0
        internal set
    public val draftedByPosition: List<Int> get() = draftedAt
    public val acceptedByPosition: List<Int> get() = acceptedAt
    public val draftedLengths: Map<Int, Int> get() = lengths
    public val sources: Map<String, SourceStats> get() = bySource
    public var lastDrafted: Int = 0
        internal set
    public var reusedTokens: Int = 0
        internal set
    public var droppedTokens: Int = 0
        internal set
    public var prefillSeconds: Double = 0.0
        internal set
    public var decodeSeconds: Double = 0.0
        internal set
    public var finishReason: String = ""
        internal set

    private val draftedAt = ArrayList<Int>()
    private val acceptedAt = ArrayList<Int>()
    private val lengths = TreeMap<Int, Int>()
    private val bySource = LinkedHashMap<String, SourceStats>()
    private var newest: Round? = null // as far as it is counted
    private var newestSource = SourceStats()

    /** Begin a text, so many of whose prompt's tokens are in the cache already. */
    internal fun begin(reusedTokens: Int) {
        this.reusedTokens = reusedTokens
        finishReason = ""
        newest = null
    }

    /** Go on after a prefill, with so many tokens left out in all. */
    internal fun shift(droppedTokens: Int) {
        this.droppedTokens = droppedTokens
        newest = null
    }

    /** Add a round, cut off where the text ends, and the [source] of its drafts. */
    internal fun add(done: Round, source: String) {
        lastDrafted = done.drafts.size
        rounds += 1
        drafted += lastDrafted
        lengths[lastDrafted] = (lengths[lastDrafted] ?: 0) + 1
        for (counts in listOf(draftedAt, acceptedAt)) while (counts.size < lastDrafted) counts.add(0)
        for (i in 0 until lastDrafted) draftedAt[i] += 1
        newestSource = if (lastDrafted == 0) SourceStats() else bySource.getOrPut(source) { SourceStats() }
        newestSource.rounds += 1
        newestSource.drafted += lastDrafted
        newest = done.cut(0)
        count(done)
    }

    /** Count the newest round as another cut of it, after the tokens that were given out, in place of the counted one. */
    internal fun count(done: Round) {
        val before = newest ?: return // the prefill is no round
        tokens += done.tokens.size - before.tokens.size
        accepted += done.accepted - before.accepted
        newestSource.accepted += done.accepted - before.accepted
        for (i in before.accepted until done.accepted) acceptedAt[i] += 1
        for (i in done.accepted until before.accepted) acceptedAt[i] -= 1
        newest = done
    }

    /** Accepted drafts / proposed drafts; null if nothing was drafted. */
    public val acceptanceRate: Double? get() = if (drafted > 0) accepted.toDouble() / drafted else null

    /**
     * Tokens that the rounds gave out / rounds; null without a round.
     *
     * That is 1 + accepted / rounds, less the bonus token of a round that the end of the text cuts off.
     */
    public val meanTokensPerRound: Double? get() = if (rounds > 0) tokens.toDouble() / rounds else null
}
