package gemmamtp.core

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import java.util.TreeMap
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.pow

/**
 * Rounds after which an observation counts half, one estimate for each. The slow estimate is exact on steady text, the
 * fast one follows a change; they are mixed by how well they predicted the latest rounds.
 */
private val HALF_LIVES_ROUNDS = intArrayOf(8, 64)

/** Factor, each round, on the log-likelihoods that say how well the estimates predicted. */
private const val SCORE_DECAY_PER_ROUND = 0.95

/**
 * Acceptance that is assumed of a draft before it is observed, and how many observations the assumption counts as. It is
 * high, so that a K that was not tried lately is tried again: no other probe is needed.
 */
private const val PRIOR_ACCEPTANCE = 0.9
private const val PRIOR_OBSERVATIONS = 2.0

/**
 * What drafting may lose against plain decoding: a fraction of the tokens, and passes at the start. Passes that it saved
 * may be lost again, up to a maximum.
 */
private const val LOSS_PASSES_PER_TOKEN = 0.01
private const val INITIAL_LOSS_PASSES = 2.0
private const val MAX_SAVED_PASSES = 16.0

/** No count and no sum of logarithms of a saved estimate is beyond it. */
private const val MAX_SAVED = 1e6

/**
 * The drafts of the next round.
 *
 * @property source [DRAFTER], a name of prompt lookup, or [GRAMMAR].
 * @property numDraftTokens K, 0 for a plain pass.
 */
internal class Plan(val source: String, val numDraftTokens: Int)

/**
 * Estimates, for one source, how likely each draft of a round is accepted if those before it were.
 *
 * @param maxDrafts the largest K of a round.
 */
internal class AcceptanceEstimate(maxDrafts: Int) {
    private val keep = DoubleArray(HALF_LIVES_ROUNDS.size) { 0.5.pow(1.0 / HALF_LIVES_ROUNDS[it]) }
    private val accepted = Array(HALF_LIVES_ROUNDS.size) { DoubleArray(maxDrafts) }
    private val rejected = Array(HALF_LIVES_ROUNDS.size) { DoubleArray(maxDrafts) }
    private val scores = DoubleArray(HALF_LIVES_ROUNDS.size) // log-likelihoods of the latest rounds, by half-life

    /** The chance of each draft, by half-life. */
    private val chances = Array(HALF_LIVES_ROUNDS.size) { DoubleArray(maxDrafts) }

    /** Probabilities that the first i drafts are accepted, from i = 0 on. */
    val reached = DoubleArray(1 + maxDrafts)

    init {
        estimate()
    }

    /**
     * Add the observations of a round.
     *
     * @param drafted how many drafts were judged; 0 only lets earlier observations fade.
     * @param acceptedDrafts how many of them were right.
     */
    fun update(drafted: Int, acceptedDrafts: Int) {
        val ended = acceptedDrafts < drafted
        for (i in HALF_LIVES_ROUNDS.indices) {
            if (drafted > 0) scores[i] *= SCORE_DECAY_PER_ROUND
            for (position in 0 until acceptedDrafts) scores[i] += ln(maxOf(chances[i][position], 1e-3))
            if (ended) scores[i] += ln(maxOf(1 - chances[i][acceptedDrafts], 1e-3))
            for (counts in listOf(accepted[i], rejected[i])) {
                for (position in counts.indices) counts[position] *= keep[i]
            }
            for (position in 0 until acceptedDrafts) accepted[i][position] += 1.0
            if (ended) rejected[i][acceptedDrafts] += 1.0
        }
        estimate()
    }

    /** The observations, as they are saved. */
    internal fun toJson() = JsonObject().apply {
        add("accepted", rows(accepted))
        add("rejected", rows(rejected))
        add("scores", row(scores))
    }

    /** Replace the observations by saved ones; throws IllegalArgumentException for those of another form. */
    internal fun restore(saved: JsonObject) {
        for ((key, counts) in listOf("accepted" to accepted, "rejected" to rejected)) {
            val lists = items(saved.get(key), counts.size, key)
            counts.indices.forEach { fill(counts[it], lists[it], 0.0, MAX_SAVED, key) }
        }
        fill(scores, saved.get("scores"), -MAX_SAVED, 0.0, "scores")
        estimate()
    }

    private fun estimate() {
        val best = scores.max()
        val weights = scores.map { exp(it - best) }
        reached.fill(0.0)
        for (i in HALF_LIVES_ROUNDS.indices) {
            var chance = PRIOR_ACCEPTANCE
            var through = weights[i] / weights.sum()
            reached[0] += through
            for (position in chances[i].indices) {
                // A draft is expected to do as well as the one before it until observations say otherwise.
                val good = accepted[i][position]
                chance = (good + PRIOR_OBSERVATIONS * chance) / (good + rejected[i][position] + PRIOR_OBSERVATIONS)
                through *= chance
                chances[i][position] = chance
                reached[position + 1] += through
            }
        }
    }
}

/**
 * Chooses K, the number of draft tokens, and their source before each round, for the most tokens a second. One instance
 * serves all texts of a bundle on a device.
 *
 * A round of K drafts is expected to add 1 + the sum over i <= K of the probability that i drafts are accepted. Its time
 * is measured.
 *
 * The loss is the time that drafting took beyond plain decoding so far, in plain passes, minus what it may lose. A round
 * that could bring it above 0 is not planned, whatever its expected gain. So, by the costs as they are known, texts take
 * at most 1.01 times as long as plain decoding and two passes together, and no stretch of them more than 16 passes
 * beyond that.
 *
 * @param maxDrafts the largest K of a round.
 * @property costs measured times of passes and draft steps.
 */
internal class DraftLength(private val maxDrafts: Int, val costs: Costs) {
    private val sources = HashMap<String, AcceptanceEstimate>()
    private var lossPasses = -INITIAL_LOSS_PASSES

    /**
     * Choose a source and K for the next round.
     *
     * @param available sources, and the largest number of drafts that each can give now.
     */
    fun plan(available: List<Pair<String, Int>>): Plan {
        val unmeasured = costs.nextToMeasure(available.firstOrNull { it.first == DRAFTER }?.second ?: 0)
        if (unmeasured != null && affordable(DRAFTER, unmeasured)) return Plan(DRAFTER, unmeasured)
        var best = 1.0
        var plan = Plan(DRAFTER, 0)
        for ((source, has) in available) {
            var tokens = 1.0
            val reached = acceptance(source).reached
            for (drafts in 1..minOf(has, maxDrafts)) {
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

    /**
     * Add a source's drafts of one round to its acceptance estimate.
     *
     * @param drafted drafts that were verified, or known to be right or wrong in another way; with 0 the source's earlier
     *     observations fade.
     * @param accepted how many of them were right.
     */
    fun learn(source: String, drafted: Int, accepted: Int) = acceptance(source).update(drafted, accepted)

    /**
     * Add a round's time, less the time of as many tokens by plain decoding, to the loss.
     *
     * @param tokens how many tokens the round added.
     * @param verified how many of the plan's drafts were verified: fewer where rules forbid some.
     */
    fun recordLoss(plan: Plan, tokens: Int, verified: Int) {
        var cost = costs.relative(plan.source, plan.numDraftTokens)
        if (verified < plan.numDraftTokens) cost += costs.relative("", verified) - costs.relative("", plan.numDraftTokens)
        lossPasses += cost - tokens * (1 + LOSS_PASSES_PER_TOKEN)
        lossPasses = lossPasses.coerceIn(-MAX_SAVED_PASSES, MAX_SAVED)
    }

    /** What it has learnt, as sessions keep it; costs are the device's own. */
    internal fun toJson() = JsonObject().apply {
        addProperty("loss_passes", lossPasses)
        val estimates = JsonObject() // in one order, so that equal estimates are equal bytes
        TreeMap(sources).forEach { (source, estimate) -> estimates.add(source, estimate.toJson()) }
        add("sources", estimates)
    }

    /**
     * Go on from what another planner had learnt, unless this one has learnt something: that is newer.
     *
     * @param saved what [toJson] returned; for anything else IllegalArgumentException is thrown.
     */
    internal fun restore(saved: JsonElement) {
        require(saved is JsonObject) { "the planner is no object" }
        val estimates = saved.get("sources")
        require(estimates is JsonObject) { "sources of the planner are no object" }
        val read = estimates.entrySet().associate { (source, estimate) ->
            require(estimate is JsonObject) { "the estimate of \"$source\" is no object" }
            source to AcceptanceEstimate(maxDrafts).apply { restore(estimate) }
        }
        val loss = number(saved.get("loss_passes"), -MAX_SAVED_PASSES, MAX_SAVED, "loss_passes")
        if (sources.isNotEmpty() || lossPasses != -INITIAL_LOSS_PASSES) return
        sources.putAll(read)
        lossPasses = loss
    }

    /** Whether the loss stays within the allowance even if no draft is accepted. */
    private fun affordable(source: String, drafts: Int) = lossPasses + costs.relative(source, drafts) - 1 <= 0

    private fun acceptance(source: String) = sources.getOrPut(source) { AcceptanceEstimate(maxDrafts) }
}

private fun row(numbers: DoubleArray) = JsonArray().apply { numbers.forEach { add(it) } }

private fun rows(numbers: Array<DoubleArray>) = JsonArray().apply { numbers.forEach { add(row(it)) } }

private fun items(saved: JsonElement?, count: Int, name: String): JsonArray {
    require(saved is JsonArray && saved.size() == count) { "$name of an estimate is no list of $count" }
    return saved
}

private fun fill(numbers: DoubleArray, saved: JsonElement?, least: Double, most: Double, name: String) {
    val list = items(saved, numbers.size, name)
    numbers.indices.forEach { numbers[it] = number(list[it], least, most, name) }
}

private fun number(saved: JsonElement?, least: Double, most: Double, name: String): Double {
    val number = saved?.takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isNumber }?.asString?.toDoubleOrNull()
    require(number != null && number in least..most) { "$name is $saved, expected a number from $least to $most" }
    return number
}
