package gemmamtp.core

import kotlin.math.exp
import kotlin.math.ln

/** Logits that a bundle's target gives for each position. */
const val LARGEST_TOP_K = 64

private const val GOLDEN = -0x61c8864680b583ebL // 0x9E3779B97F4A7C15
private const val MIX_1 = -0x40a7b892e31b1a47L // 0xBF58476D1CE4E5B9
private const val MIX_2 = -0x6b2fb644ecceee15L // 0x94D049BB133111EB

/**
 * How tokens are chosen: temperature 0 is greedy; top-p 1 keeps every one of the [topK] largest logits.
 *
 * @property seed 64 bits, of which the sign is one.
 */
data class Sampling(
    val temperature: Double = 0.0,
    val topP: Double = 1.0,
    val seed: Long = 0,
    val topK: Int = LARGEST_TOP_K,
) {
    init {
        if (!(temperature >= 0 && temperature < Double.POSITIVE_INFINITY)) {
            throw InputError("temperature is $temperature, expected 0 (greedy) or a positive number")
        }
        if (!(topP > 0 && topP <= 1)) throw InputError("top-p is $topP, expected more than 0 and at most 1")
        if (topK !in 1..LARGEST_TOP_K) {
            throw InputError(
                "top-k is $topK, expected 1 to $LARGEST_TOP_K: a bundle gives no more logits of a token",
            )
        }
    }
}

/**
 * Noise in [0, 1) for the token at a position: top 24 bits of SplitMix64 (Steele, Lea & Flood 2014).
 *
 * The same seed and position give the same number in every call, so a token does not depend on whether it was drafted.
 */
fun uniform(seed: Long, position: Int): Double {
    var x = (seed xor (position * GOLDEN)) + GOLDEN
    x = (x xor (x ushr 30)) * MIX_1
    x = (x xor (x ushr 27)) * MIX_2
    return ((x xor (x ushr 31)) ushr 40).toDouble() / (1 shl 24)
}

/**
 * Choose the token at [position] from its largest logits, in falling order; returns its index there.
 *
 * Greedy takes the first. Sampling takes the first whose cumulative probability, after temperature, the top-k cut and
 * the top-p cut, exceeds the position's noise.
 */
fun choose(logits: FloatArray, position: Int, sampling: Sampling): Int {
    if (sampling.temperature == 0.0) return 0
    val first = logits[0].toDouble()
    // A tiny temperature sends everything but the first to minus infinity.
    val weights = DoubleArray(minOf(sampling.topK, logits.size)) { exp((logits[it] - first) / sampling.temperature) }
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

/** Natural logarithm of the probability of one of the largest logits among each other, at temperature 1. */
fun logProbability(logits: FloatArray, rank: Int): Double {
    val first = logits[0].toDouble()
    return (logits[rank] - first) - ln(logits.sumOf { exp(it - first) })
}
