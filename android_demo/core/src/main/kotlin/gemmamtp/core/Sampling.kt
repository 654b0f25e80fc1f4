package gemmamtp.core

import java.nio.FloatBuffer
import kotlin.math.exp
import kotlin.math.ln

/** Logits that a bundle's target gives for each position. */
internal const val MAX_TOP_K = 64

/** SplitMix64's constants: its increment, then its factors. */
private const val GOLDEN_GAMMA = -0x61c8864680b583ebL // 0x9E3779B97F4A7C15
private const val MIX_1 = -0x40a7b892e31b1a47L // 0xBF58476D1CE4E5B9
private const val MIX_2 = -0x6b2fb644ecceee15L // 0x94D049BB133111EB

/**
 * A chosen token.
 *
 * @property token its id.
 * @property logprob natural logarithm of its probability for the target, as [logProbability] defines it.
 */
internal class Choice(val token: Int, val logprob: Double)

/** What chooses the tokens of a text, one after the other. [Sampled] is one, [RuledChooser] another. */
internal interface Chooser {
    /**
     * Choose the next token of the text, which counts as part of it from now on.
     *
     * @param logits the target's largest, in falling order.
     * @param ids their token ids.
     * @param state the target's state of the same row, E numbers from index 0 on; to be read before the next pass.
     * @param position index of the token in the whole text, prompt included.
     */
    fun pick(logits: FloatArray, ids: IntArray, state: FloatBuffer, position: Int): Choice
}

/**
 * How tokens are chosen; the default is greedy. It has no history: each choice depends on its row alone.
 *
 * @property temperature divides the logits, 0 or more; 0 is greedy.
 * @property topP keep the most likely tokens whose probabilities together reach it, more than 0 and at most 1; 1 keeps
 *     every one of the [topK].
 * @property seed of the noise, 64 bits, of which the sign is one.
 * @property topK how many of the largest logits are kept, 1 to [MAX_TOP_K].
 * @throws InputError a value is out of its range.
 */
public data class Sampling @JvmOverloads constructor(
    val temperature: Double = 0.0,
    val topP: Double = 1.0,
    val seed: Long = 0,
    val topK: Int = MAX_TOP_K,
) {
    init {
        if (!(temperature >= 0 && temperature < Double.POSITIVE_INFINITY)) {
            throw InputError("temperature is $temperature, expected 0 (greedy) or a positive number")
        }
        if (!(topP > 0 && topP <= 1)) throw InputError("top-p is $topP, expected more than 0 and at most 1")
        if (topK !in 1..MAX_TOP_K) {
            throw InputError(
                "top-k is $topK, expected 1 to $MAX_TOP_K: a bundle gives no more logits of a token",
            )
        }
    }
}

/** Chooses tokens by [sampling] alone. */
internal class Sampled(private val sampling: Sampling = Sampling()) : Chooser {
    override fun pick(logits: FloatArray, ids: IntArray, state: FloatBuffer, position: Int): Choice {
        val rank = choose(logits, position, sampling)
        return Choice(ids[rank], logProbability(logits, rank))
    }
}

/** Chooses tokens of a text whose oldest [dropped] tokens were left out, by their positions in the whole text. */
internal class Displaced(private val chooser: Chooser, private val dropped: Int) : Chooser {
    override fun pick(logits: FloatArray, ids: IntArray, state: FloatBuffer, position: Int): Choice =
        chooser.pick(logits, ids, state, position + dropped)
}

/**
 * Noise in [0, 1) for the token at a position: the top 24 bits of SplitMix64 (Steele, Lea & Flood 2014).
 *
 * The same seed and position give the same number in every call, so a token does not depend on whether it was drafted.
 *
 * @param position index of the token in the whole text, prompt included.
 */
internal fun uniform(seed: Long, position: Int): Double {
    var x = (seed xor (position * GOLDEN_GAMMA)) + GOLDEN_GAMMA
    x = (x xor (x ushr 30)) * MIX_1
    x = (x xor (x ushr 27)) * MIX_2
    return ((x xor (x ushr 31)) ushr 40).toDouble() / (1 shl 24)
}

/**
 * Choose a token from the largest logits of its position; returns its index in [logits].
 *
 * Greedy takes the first. Sampling takes the first whose cumulative probability, after temperature, the top-k cut and
 * the top-p cut, exceeds the position's noise. Probabilities are doubles.
 *
 * @param logits in falling order.
 * @param position index of the token in the whole text, prompt included.
 */
internal fun choose(logits: FloatArray, position: Int, sampling: Sampling): Int =
    if (sampling.temperature == 0.0) 0
    else choose(DoubleArray(logits.size) { logits[it].toDouble() }, logits.size, position, sampling)

/** Choose from the first [count] of logits after [Rules], as the other [choose] does. */
internal fun choose(logits: DoubleArray, count: Int, position: Int, sampling: Sampling): Int {
    if (sampling.temperature == 0.0) return 0
    val first = logits[0]
    // A tiny temperature sends everything but the first to minus infinity.
    val weights = DoubleArray(minOf(sampling.topK, count)) { exp((logits[it] - first) / sampling.temperature) }
    val sum = weights.sum()
    val cumulative = DoubleArray(weights.size)
    var below = 0.0
    for (i in weights.indices) {
        below += weights[i] / sum
        cumulative[i] = below
    }
    val last = cumulative.indices.firstOrNull { cumulative[it] >= sampling.topP } ?: cumulative.lastIndex
    val noise = uniform(sampling.seed, position)
    return (0..last).firstOrNull { cumulative[it] / cumulative[last] > noise } ?: last
}

/**
 * Natural logarithm of the probability of one of the largest logits, at temperature 1.
 *
 * Smaller logits are not known and count as nothing, so the probability is a little too high.
 *
 * @param logits in falling order.
 * @param rank index of the token in [logits].
 */
internal fun logProbability(logits: FloatArray, rank: Int): Double {
    val first = logits[0].toDouble()
    return (logits[rank] - first) - ln(logits.sumOf { exp(it - first) })
}
