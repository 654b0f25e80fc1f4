package gemmamtp.core

/**
 * The source of drafts that a grammar, or the limit of a thought, forces; they take no time to make. This runtime has no
 * grammars.
 */
internal const val GRAMMAR = "grammar"

/** The drafts of a text: from the drafter, copied from earlier text, or what a rule forces. */
internal interface Drafts {
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

/**
 * The same number of drafts in each round: what a rule forces next, else from the drafter.
 *
 * @param numDraftTokens K of every round, less what the rules forbid.
 * @param rules chooses the text's tokens; null if no rule does.
 */
internal class FixedDrafts(
    private val engine: Engine,
    private val numDraftTokens: Int,
    private val rules: RuledChooser? = null,
) : Drafts {
    override var source = DRAFTER
        private set

    override fun make(last: Int, maxDrafts: Int): List<Int> {
        val count = minOf(numDraftTokens, maxDrafts)
        val forced = rules?.forced(count).orEmpty()
        source = if (forced.isEmpty()) DRAFTER else GRAMMAR
        return allowed(rules, forced.ifEmpty { engine.draft(last, count) })
    }

    override fun learn(done: Round, draftSeconds: Double, verifySeconds: Double) = Unit
}

/**
 * Names of prompt lookup as a source, by the smallest number of tokens that match. The more match, the likelier is what
 * follows, so each has its own acceptance estimate.
 */
private val LOOKUP_SOURCES =
    listOf(9 to "lookup of 9 or more", 5 to "lookup of 5 to 8", 3 to "lookup of 3 or 4", 2 to "lookup of 2")

/**
 * As many drafts as [DraftLength] plans, from the drafter, by prompt lookup, or what a rule forces.
 *
 * What takes no draft step is compared with the text in every round, so its estimate needs no trials.
 *
 * @param prompt token ids of the prompt, which prompt lookup copies from as well.
 * @param rules chooses the text's tokens; null if no rule does.
 */
internal class PlannedDrafts(
    private val engine: Engine,
    private val planner: DraftLength,
    prompt: List<Int>,
    private val rules: RuledChooser? = null,
) : Drafts {
    private val lookup = Lookup().apply { extend(prompt) }
    private var plan = Plan(DRAFTER, 0)
    private var atHand = emptyMap<String, List<Int>>() // drafts that take no step, by their source

    override val source get() = plan.source

    override fun make(last: Int, maxDrafts: Int): List<Int> {
        lookup.extend(listOf(last))
        val match = lookup.find(maxDrafts)
        val lookupSource = LOOKUP_SOURCES.firstOrNull { (smallest, _) -> match.matching >= smallest }?.second ?: ""
        val forced = rules?.forced(maxDrafts).orEmpty()
        atHand = linkedMapOf(GRAMMAR to forced, lookupSource to match.tokens).filterValues { it.isNotEmpty() }
        plan = planner.plan(listOf(DRAFTER to maxDrafts) + atHand.map { (source, drafts) -> source to drafts.size })
        val made = atHand[plan.source]?.take(plan.numDraftTokens) ?: engine.draft(last, plan.numDraftTokens)
        return allowed(rules, made)
    }

    override fun learn(done: Round, draftSeconds: Double, verifySeconds: Double) {
        val made = plan.numDraftTokens
        val verified = done.drafts.size
        val byDrafter = plan.source == DRAFTER
        // Draft steps were also taken for drafts that were cut off.
        planner.costs.record(verified, verifySeconds, if (byDrafter && made > 0) draftSeconds * verified / made else null)
        planner.recordLoss(plan, done.tokens.size, verified)
        val judged = minOf(verified + 1, made) // the first that was cut off is known to be wrong
        if (byDrafter) planner.learn(DRAFTER, judged, done.accepted) else planner.learn(DRAFTER, 0, 0)
        for ((source, drafts) in atHand) {
            if (source == plan.source) {
                planner.learn(source, judged, done.accepted)
            } else {
                val seen = minOf(done.tokens.size, drafts.size)
                val right = commonPrefix(drafts, done.tokens)
                planner.learn(source, minOf(right + 1, seen), right)
            }
        }
        lookup.extend(done.tokens.dropLast(1))
    }
}

/** The drafts before the first that the rules forbid. */
private fun allowed(rules: RuledChooser?, drafts: List<Int>) =
    if (rules == null) drafts else drafts.take(rules.numAllowed(drafts))
