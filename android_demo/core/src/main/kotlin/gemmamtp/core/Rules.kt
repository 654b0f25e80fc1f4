package gemmamtp.core

import java.nio.FloatBuffer
import kotlin.math.abs

/** Of the bias of a token, in either direction, as OpenAI's interface and vLLM have it. */
private const val MAX_BIAS = 100

/** Of presence and frequency penalties, in either direction, as there. */
private const val MAX_PENALTY = 2

/** Of the repetition penalty: peers take any positive number; far beyond these, doubles would overflow. */
internal const val MIN_REPETITION = 0.01
internal const val MAX_REPETITION = 100

/**
 * What changes logits before a token is chosen; the default changes nothing.
 *
 * A rule depends on the position and on the text before it, never on what was drafted, so speculative and plain decoding
 * choose the same tokens. FORMAT.md ("Rules before the choice") has the arithmetic.
 *
 * @property suppressed ids of tokens that are never chosen.
 * @property logitBias by token id, what is added to its logit, -100 to 100.
 * @property repetitionPenalty 0.01 to 100. Logits of tokens that are in the prompt or in the answer so far are divided by
 *     it if they are positive, else multiplied (CTRL, Keskar et al. 2019); 1 changes nothing.
 * @property presencePenalty subtracted from the logits of tokens that are in the answer so far, -2 to 2.
 * @property frequencyPenalty subtracted from the logit of a token as many times as it is in the answer so far, -2 to 2.
 * @throws InputError a value is out of its range.
 */
public data class Rules @JvmOverloads constructor(
    val suppressed: Set<Int> = emptySet(),
    val logitBias: Map<Int, Double> = emptyMap(),
    val repetitionPenalty: Double = 1.0,
    val presencePenalty: Double = 0.0,
    val frequencyPenalty: Double = 0.0,
) {
    init {
        if (!(repetitionPenalty >= MIN_REPETITION && repetitionPenalty <= MAX_REPETITION)) {
            throw InputError(
                "repetition penalty is $repetitionPenalty, expected $MIN_REPETITION to $MAX_REPETITION; 1 is none",
            )
        }
        for ((name, penalty) in listOf("presence" to presencePenalty, "frequency" to frequencyPenalty)) {
            if (!(abs(penalty) <= MAX_PENALTY)) {
                throw InputError("$name penalty is $penalty, expected -$MAX_PENALTY to $MAX_PENALTY")
            }
        }
        for ((token, bias) in logitBias) {
            if (!(abs(bias) <= MAX_BIAS)) {
                throw InputError(
                    "the logit bias of token $token is $bias, expected -$MAX_BIAS to $MAX_BIAS; suppress a token that must" +
                        " never come",
                )
            }
        }
    }
}

/**
 * Refuse rules about tokens that a bundle does not have.
 *
 * @throws InputError a token id is not in the vocabulary.
 */
internal fun checkRules(manifest: Manifest, rules: Rules) {
    (rules.suppressed + rules.logitBias.keys).firstOrNull { it !in 0 until manifest.vocabSize }?.let {
        throw InputError("a rule names token id $it, expected 0 to ${manifest.vocabSize - 1}")
    }
}

/**
 * Refuse rules about parts of a text that a bundle does not have.
 *
 * @param thinkingBudget as for [textChooser].
 * @throws InputError the bundle has no channel of thoughts, or the budget is negative.
 */
internal fun checkParts(manifest: Manifest, thinkingBudget: Int?) {
    if (thinkingBudget == null) return
    if (thinkingBudget < 0) throw InputError("the thinking budget is $thinkingBudget tokens, expected 0 or more")
    if (THOUGHT !in manifest.channels) {
        throw InputError("a thinking budget is about thoughts, and the bundle's chat template marks none; leave it out")
    }
}

/** Computes the logit of a token from a state, as [Engine.score]. */
internal fun interface Score {
    fun logit(state: FloatBuffer, token: Int): Float
}

/**
 * Chooses the tokens of one text by rules and sampling; a [Chooser] that keeps the text's tokens.
 *
 * Candidates are the bundle's largest logits and the tokens that a rule can raise above them, whose logits are computed
 * from the state. Where the rules leave none of them at least as large as the bundle's smallest, the logits of all tokens
 * that they allow are computed. So the largest is that of the whole vocabulary.
 *
 * @param sampling how tokens are chosen once the rules were applied.
 * @param prompt token ids of the prompt.
 * @param vocabSize V.
 * @param limit how long the model may think; null for no limit.
 * @param never ids of tokens that the bundle itself suppresses.
 */
internal class RuledChooser(
    private val sampling: Sampling,
    private val rules: Rules,
    prompt: List<Int>,
    private val vocabSize: Int,
    private val score: Score,
    private val limit: ThoughtLimit? = null,
    never: Set<Int> = emptySet(),
) : Chooser {
    private val suppressed = rules.suppressed + never
    private val seen = prompt.toHashSet() // tokens of prompt and answer
    private val counts = HashMap<Int, Int>() // how often a token is in the answer
    private val largest = Candidates()

    // Tokens whose logits a rule may raise: only these can overtake the bundle's largest.
    private val raised = rules.logitBias.filterValues { it > 0 }.keys.toHashSet()
    private val raisesAnswer = rules.repetitionPenalty < 1 || minOf(rules.presencePenalty, rules.frequencyPenalty) < 0

    init {
        if (rules.repetitionPenalty < 1) raised.addAll(prompt)
    }

    /**
     * Choose the next token, as [Chooser.pick].
     *
     * @throws InputError the rules allow no token here.
     */
    override fun pick(logits: FloatArray, ids: IntArray, state: FloatBuffer, position: Int): Choice {
        largest.clear()
        for (i in ids.indices) if (allowed(ids[i])) offer(ids[i], logits[i])
        for (token in raised) if (allowed(token) && token !in ids) offer(token, score.logit(state, token))
        // Tokens that are neither the bundle's nor raised have no larger logits than the bundle's last.
        if (largest.size == 0 || largest.values[0] < logits.last()) {
            for (token in limit?.forced?.let { it..it } ?: (0 until vocabSize)) {
                val known = token in ids || token in raised
                if (!known && allowed(token)) offer(token, score.logit(state, token))
            }
        }
        if (largest.size == 0) {
            throw InputError("the rules allow no token at position $position of the text; suppress fewer tokens")
        }
        val chosen = choose(largest.values, largest.size, position, sampling)
        val token = largest.tokens[chosen]
        commit(token)
        return Choice(token, logProbability(largest.logits[chosen], logits))
    }

    /** Count a token as the next of the text; [pick] does so with what it chose. */
    fun commit(token: Int) {
        seen.add(token)
        counts[token] = (counts[token] ?: 0) + 1
        if (raisesAnswer) raised.add(token)
        limit?.commit(token)
    }

    /**
     * The tokens that the limit of a thought forces next, at most [maxTokens].
     *
     * While tokens are forced, nothing but the first of them is allowed, so as drafts they are accepted.
     */
    fun forced(maxTokens: Int): List<Int> = listOfNotNull(limit?.forced).take(maxTokens)

    /** How many of the drafts may come next, in their order: those before the first that is forbidden. */
    fun numAllowed(drafts: List<Int>): Int {
        val free = drafts.takeWhile { it !in suppressed }
        return limit?.numAllowed(free) ?: free.size
    }

    private fun allowed(token: Int) = token !in suppressed && limit?.allows(token) != false

    /** Make a token a candidate, whose logit after biases and penalties is computed in the order of vLLM. */
    private fun offer(token: Int, logit: Float) {
        var value = logit + (rules.logitBias[token] ?: 0.0)
        val penalty = rules.repetitionPenalty
        if (penalty != 1.0 && token in seen) value = if (value > 0) value / penalty else value * penalty
        val count = counts[token]
        if (count != null) value = value - rules.frequencyPenalty * count - rules.presencePenalty
        largest.add(token, logit, value)
    }
}

/** The model's own log-probability of a token, also of one that is not among the largest logits. */
private fun logProbability(logit: Float, logits: FloatArray) = logit - logits[0].toDouble() + logProbability(logits, rank = 0)

/** The largest candidates for a token, at most [MAX_TOP_K], in falling order, of equal ones the lower id first. */
private class Candidates {
    val tokens = IntArray(MAX_TOP_K)
    val logits = FloatArray(MAX_TOP_K) // before the rules
    val values = DoubleArray(MAX_TOP_K) // after them
    var size = 0
        private set

    fun clear() {
        size = 0
    }

    fun add(token: Int, logit: Float, value: Double) {
        var at = size
        while (at > 0 && (value > values[at - 1] || value == values[at - 1] && token < tokens[at - 1])) at--
        if (at == MAX_TOP_K) return
        val moved = minOf(size, MAX_TOP_K - 1)
        tokens.copyInto(tokens, at + 1, at, moved)
        logits.copyInto(logits, at + 1, at, moved)
        values.copyInto(values, at + 1, at, moved)
        tokens[at] = token
        logits[at] = logit
        values[at] = value
        size = moved + 1
    }
}

/**
 * What chooses the tokens of a text by rules; null if there are none, and [sampling] alone chooses.
 *
 * @param prompt token ids.
 * @param sampling how tokens are chosen once the rules were applied.
 * @param thinkingBudget the largest number of tokens of thoughts; null for any.
 */
internal fun textChooser(
    engine: Engine,
    prompt: List<Int>,
    sampling: Sampling,
    rules: Rules,
    thinkingBudget: Int?,
): RuledChooser? {
    if (rules == Rules() && thinkingBudget == null) return null
    val manifest = engine.manifest
    val limit = thinkingBudget?.let {
        val tracker = PartTracker(manifest.channels, manifest.eos, prompt)
        ThoughtLimit(tracker, manifest.channels.getValue(THOUGHT), it)
    }
    return RuledChooser(sampling, rules, prompt, manifest.vocabSize, engine::score, limit, manifest.suppressed)
}
