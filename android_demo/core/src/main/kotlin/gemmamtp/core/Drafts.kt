package gemmamtp.core

/** The drafts of a text: from the drafter, or copied from earlier text. */
interface Drafts {
    /** The source of the last round's drafts. */
    val source: String

    /** Draft tokens after the token [last], at most [maxDrafts]. */
    fun make(last: Int, maxDrafts: Int): List<Int>

    /**
     * Learn from the outcome of a round.
     *
     * @param draftSeconds time of making its drafts.
     * @param verifySeconds time of its verify pass.
     */
    fun learn(done: Round, draftSeconds: Double, verifySeconds: Double)
}

/** The same number of drafts from the drafter in each round. */
class FixedDrafts(private val engine: Engine, private val numDraftTokens: Int) : Drafts {
    override val source = DRAFTER

    override fun make(last: Int, maxDrafts: Int) = engine.draft(last, minOf(numDraftTokens, maxDrafts))

    override fun learn(done: Round, draftSeconds: Double, verifySeconds: Double) = Unit
}

/**
 * Names of prompt lookup as a source, by the smallest number of tokens that match. The more match, the likelier is what
 * follows, so each has its own acceptance estimate.
 */
private val LOOKUP_SOURCES =
    listOf(9 to "lookup of 9 or more", 5 to "lookup of 5 to 8", 3 to "lookup of 3 or 4", 2 to "lookup of 2")

/**
 * As many drafts as [DraftLength] plans, from the drafter or by prompt lookup.
 *
 * What prompt lookup would have proposed is compared with the text in every round, so its estimate needs no trials.
 *
 * @param prompt token ids of the prompt, which prompt lookup copies from as well.
 */
class PlannedDrafts(private val engine: Engine, private val planner: DraftLength, prompt: List<Int>) : Drafts {
    private val lookup = Lookup().apply { extend(prompt) }
    private var plan = Plan(DRAFTER, 0)
    private var copied = emptyList<Int>()
    private var lookupSource = ""

    override val source get() = plan.source

    override fun make(last: Int, maxDrafts: Int): List<Int> {
        lookup.extend(listOf(last))
        val match = lookup.find(maxDrafts)
        copied = match.tokens
        lookupSource = LOOKUP_SOURCES.firstOrNull { (smallest, _) -> match.matching >= smallest }?.second ?: ""
        val byLookup = if (copied.isEmpty()) emptyList() else listOf(lookupSource to maxDrafts)
        plan = planner.plan(listOf(DRAFTER to maxDrafts) + byLookup)
        if (plan.source != DRAFTER) return copied.take(plan.numDraftTokens)
        return engine.draft(last, plan.numDraftTokens)
    }

    override fun learn(done: Round, draftSeconds: Double, verifySeconds: Double) {
        val drafted = done.drafts.size
        val byDrafter = plan.source == DRAFTER
        planner.costs.record(drafted, verifySeconds, if (byDrafter) draftSeconds else null)
        planner.recordLoss(plan, done.tokens.size)
        if (byDrafter) planner.learn(DRAFTER, drafted, done.accepted) else planner.learn(DRAFTER, 0, 0)
        if (!byDrafter) {
            planner.learn(plan.source, drafted, done.accepted)
        } else if (copied.isNotEmpty()) {
            val seen = minOf(done.tokens.size, copied.size)
            val right = commonPrefix(copied, done.tokens)
            planner.learn(lookupSource, minOf(right + 1, seen), right)
        }
        lookup.extend(done.tokens.dropLast(1))
    }
}
