package gemmamtp.demo

import gemmamtp.core.InputError
import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.Sampling

/** The largest number of tokens of a run. */
const val BENCHMARK_TOKENS = 64

/** Measured turns; each has a plain and a speculative run. */
const val BENCHMARK_RUNS = 5

/**
 * One text of a benchmark.
 *
 * @property tokens its token ids.
 * @param seconds time of all its rounds.
 */
class Run(val tokens: List<Int>, seconds: Double) {
    /** Tokens a second; the first token comes from the prefill, so it does not count. */
    val rate = (tokens.size - 1) / seconds
}

/**
 * Plain and speculative decoding compared.
 *
 * @property plain tokens a second of plain decoding, median.
 * @property drafted tokens a second of speculative decoding, median.
 * @property ratio median of the ratios within turns, because the device warms up and throttles between turns.
 * @property equal whether all texts have the same tokens.
 * @property tokens number of tokens of each text.
 * @property runs number of turns.
 */
data class Comparison(
    val plain: Double,
    val drafted: Double,
    val ratio: Double,
    val equal: Boolean,
    val tokens: Int,
    val runs: Int,
)

/** Compare runs that were made in turns, a plain and a speculative one in each. */
fun compare(plain: List<Run>, drafted: List<Run>) = Comparison(
    plain = median(plain.map { it.rate }),
    drafted = median(drafted.map { it.rate }),
    ratio = median(plain.zip(drafted) { without, with -> with.rate / without.rate }),
    equal = (plain + drafted).map { it.tokens }.distinct().size == 1,
    tokens = plain.first().tokens.size,
    runs = plain.size,
)

/** The middle value; of an even number of values the mean of the middle two. */
fun median(values: List<Double>): Double {
    val sorted = values.sorted()
    return (sorted[(sorted.size - 1) / 2] + sorted[sorted.size / 2]) / 2
}

/**
 * Generate the same greedy answer plain and speculative, in [BENCHMARK_RUNS] turns after one that only warms up.
 *
 * @param numDraftTokens K of the speculative runs; null chooses the fastest K for each round.
 * @param report receives the number of turns that are done.
 * @param write generates one text to its end and returns its token ids, so that the caller can show and stop it.
 * @throws InputError the answer ends before anything can be measured.
 */
fun benchmark(
    model: Model,
    prompt: String,
    numDraftTokens: Int?,
    report: Report,
    write: (Writing) -> List<Int>,
): Comparison {
    val plain = ArrayList<Run>()
    val drafted = ArrayList<Run>()
    for (turn in 0..BENCHMARK_RUNS) {
        report.at(Work(Step.MEASURING, turn.toLong(), BENCHMARK_RUNS + 1L))
        val both = listOf(0 to plain, numDraftTokens to drafted)
        // The second run of a turn finds the device warmer, so the order alternates.
        for ((drafts, runs) in if (turn % 2 == 0) both else both.reversed()) {
            model.forget()
            val writing = model.write(listOf(Message("user", prompt)), Options(BENCHMARK_TOKENS, drafts, Sampling()))
            val tokens = write(writing)
            if (tokens.size < 2) {
                throw InputError("the answer to this prompt ends at once: there is nothing to time; try another prompt")
            }
            if (turn > 0) runs.add(Run(tokens, writing.counts.decodeSeconds))
        }
    }
    return compare(plain, drafted)
}
