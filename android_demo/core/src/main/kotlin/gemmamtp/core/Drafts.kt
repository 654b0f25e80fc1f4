package gemmamtp.core

/** Where the drafts of a text come from. */
interface Drafts {
    /** Who made the drafts of the last round. */
    val source: String

    /** At most so many drafts after [last]. */
    fun make(last: Int, most: Int): List<Int>

    /** Count what the round did and took. */
    fun learn(done: Round, draftSeconds: Double, verifySeconds: Double)
}

/** The same number of drafts each round, from the drafter. */
class FixedDrafts(private val engine: Engine, private val numDraftTokens: Int) : Drafts {
    override val source = DRAFTER

    override fun make(last: Int, most: Int) = engine.draft(last, minOf(numDraftTokens, most))

    override fun learn(done: Round, draftSeconds: Double, verifySeconds: Double) = Unit
}

/** Look-ups by how many tokens agree: the more, the likelier what follows agrees too, so each has its own estimate. */
private val AGREEING =
    listOf(9 to "lookup of 9 or more", 5 to "lookup of 5 to 8", 3 to "lookup of 3 or 4", 2 to "lookup of 2")

/**
 * As many as [DraftLength] plans, from the drafter or from where the newest tokens stood before.
 *
 * What a look-up would have been worth shows in each round, whoever made its drafts.
 */
class PlannedDrafts(private val engine: Engine, private val length: DraftLength, prompt: List<Int>) : Drafts {
    private val lookup = Lookup().apply { extend(prompt) }
    private var plan = Plan(DRAFTER, 0)
    private var found = emptyList<Int>()
    private var kind = ""

    override val source get() = plan.source

    override fun make(last: Int, most: Int): List<Int> {
        lookup.extend(listOf(last))
        val looked = lookup.find(most)
        found = looked.tokens
        kind = AGREEING.firstOrNull { (least, _) -> looked.agreeing >= least }?.second ?: ""
        plan = length.plan(if (found.isEmpty()) listOf(DRAFTER to most) else listOf(DRAFTER to most, kind to most))
        if (plan.source != DRAFTER) return found.take(plan.numDraftTokens)
        return engine.draft(last, plan.numDraftTokens)
    }

    override fun learn(done: Round, draftSeconds: Double, verifySeconds: Double) {
        val drafted = done.drafts.size
        val own = plan.source == DRAFTER
        length.costs.measured(drafted, verifySeconds, if (own) draftSeconds else null)
        length.pay(plan, done.tokens.size)
        if (own) length.learn(DRAFTER, drafted, done.accepted) else length.learn(DRAFTER, 0, 0)
        if (!own) {
            length.learn(plan.source, drafted, done.accepted)
        } else if (found.isNotEmpty()) {
            val seen = minOf(done.tokens.size, found.size)
            val right = (0 until seen).firstOrNull { found[it] != done.tokens[it] } ?: seen
            length.learn(kind, minOf(right + 1, seen), right)
        }
        lookup.extend(done.tokens.dropLast(1))
    }
}
