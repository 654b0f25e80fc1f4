package gemmamtp.core

import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.pow

/**
 * Rounds after which an observation counts half. Estimates of each are mixed by how well they foretold the last rounds:
 * the slow one is exact on steady text, the fast one sees it change.
 */
private val HALF_LIVES = intArrayOf(8, 64)

/** What is kept, each round, of how well they foretold. */
private const val MEMORY = 0.95

/**
 * What is assumed of a draft that was not tried lately, as so many observations. It is high, so that what is forgotten
 * is tried again: no other probe is needed.
 */
private const val PRIOR = 0.9
private const val PRIOR_WEIGHT = 2.0

/**
 * What drafting may lose against plain decoding: this share of the tokens, so many passes at the start, and of what it
 * gained before at most so many.
 */
private const val ALLOWANCE = 0.01
private const val START = 2.0
private const val GAINED = 16.0

/** What to draft next: the source, and how many tokens. */
class Plan(val source: String, val numDraftTokens: Int)

/** How likely it is, from one source, that each draft of a round is accepted if those before it were. */
class Acceptance(most: Int) {
    private val keep = DoubleArray(HALF_LIVES.size) { 0.5.pow(1.0 / HALF_LIVES[it]) }
    private val accepted = Array(HALF_LIVES.size) { DoubleArray(most) }
    private val rejected = Array(HALF_LIVES.size) { DoubleArray(most) }
    private val foretold = DoubleArray(HALF_LIVES.size)

    /** The chance of each draft, by each half-life. */
    private val chances = Array(HALF_LIVES.size) { DoubleArray(most) }

    /** The chance that so many drafts are accepted, from none on. */
    val reached = DoubleArray(1 + most)

    init {
        estimate()
    }

    /** Count a round of which so many drafts were judged; a round without any makes what is known older. */
    fun update(drafted: Int, acceptedDrafts: Int) {
        val ended = acceptedDrafts < drafted
        for (i in HALF_LIVES.indices) {
            if (drafted > 0) foretold[i] *= MEMORY
            for (position in 0 until acceptedDrafts) foretold[i] += ln(maxOf(chances[i][position], 1e-3))
            if (ended) foretold[i] += ln(maxOf(1 - chances[i][acceptedDrafts], 1e-3))
            for (counts in listOf(accepted[i], rejected[i])) {
                for (position in counts.indices) counts[position] *= keep[i]
            }
            for (position in 0 until acceptedDrafts) accepted[i][position] += 1.0
            if (ended) rejected[i][acceptedDrafts] += 1.0
        }
        estimate()
    }

    private fun estimate() {
        val best = foretold.max()
        val weights = foretold.map { exp(it - best) }
        reached.fill(0.0)
        for (i in HALF_LIVES.indices) {
            var chance = PRIOR
            var through = weights[i] / weights.sum()
            reached[0] += through
            for (position in chances[i].indices) {
                // A draft is expected to do as well as the one before it until it shows otherwise.
                val good = accepted[i][position]
                chance = (good + PRIOR_WEIGHT * chance) / (good + rejected[i][position] + PRIOR_WEIGHT)
                through *= chance
                chances[i][position] = chance
                reached[position + 1] += through
            }
        }
    }
}

/**
 * How many tokens to draft next, and where from: as many as make the most tokens a second, none included. One for all
 * texts of a bundle on a device.
 *
 * What a round of K drafts adds is 1 + the sum over i <= K of the chance that i drafts are accepted. What it costs is
 * measured. A round that could lose more than the allowance and the rest allow is not planned, whatever it promises. So,
 * by the costs as they are known, texts take at most 1.01 times as long as plain decoding and two passes together, and
 * no stretch of them more than 16 passes beyond that.
 *
 * @param most drafts a round.
 */
class DraftLength(private val most: Int, val costs: Costs) {
    private val sources = HashMap<String, Acceptance>()
    private var debt = -START

    /** Choose a source and a number of drafts; [room] has the most drafts that each source has to give now. */
    fun plan(room: List<Pair<String, Int>>): Plan {
        val unknown = costs.unknown(room.firstOrNull { it.first == DRAFTER }?.second ?: 0)
        if (unknown != null && affordable(DRAFTER, unknown)) return Plan(DRAFTER, unknown)
        var best = 1.0
        var plan = Plan(DRAFTER, 0)
        for ((source, has) in room) {
            var tokens = 1.0
            val reached = acceptance(source).reached
            for (drafts in 1..minOf(has, most)) {
                tokens += reached[drafts]
                val rate = tokens / costs.relative(source, drafts)
                if (rate > best && affordable(source, drafts)) {
                    best = rate
                    plan = Plan(source, drafts)
                }
            }
        }
        return plan
    }

    /** Count drafts of a source, verified or seen to be right or wrong otherwise; none: its knowledge grows old. */
    fun learn(source: String, drafted: Int, accepted: Int) = acceptance(source).update(drafted, accepted)

    /** Count what a round of this plan cost and added. */
    fun pay(plan: Plan, tokens: Int) {
        debt += costs.relative(plan.source, plan.numDraftTokens) - tokens * (1 + ALLOWANCE)
        debt = maxOf(debt, -GAINED)
    }

    /** Whether the round may be lost as a whole. */
    private fun affordable(source: String, drafts: Int) = debt + costs.relative(source, drafts) - 1 <= 0

    private fun acceptance(source: String) = sources.getOrPut(source) { Acceptance(most) }
}
