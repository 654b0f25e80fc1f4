package gemmamtp.demo

import android.content.Context
import android.text.format.Formatter

/** The texts of the screen, in the user's language and number format. */
class ScreenText(private val context: Context) {
    /** One line or a few: the problem, the work in progress, the result, or what to do next. */
    fun status(screen: Screen): String {
        val work = screen.work
        val comparison = screen.comparison
        return when {
            screen.problem != null -> problem(screen.problem)
            screen.busy && work != null -> work(work)
            screen.phase == Phase.COPYING || screen.phase == Phase.OPENING -> string(R.string.opening)
            screen.phase == Phase.WRITING -> string(R.string.writing)
            screen.phase == Phase.BENCHMARKING -> string(R.string.benchmarking)
            screen.phase == Phase.IDLE -> string(R.string.no_bundle)
            comparison != null -> comparison(comparison)
            screen.counts?.finish.isNullOrEmpty() -> string(if (screen.chats) R.string.ready_chat else R.string.ready_text)
            else -> finished(screen.counts)
        }
    }

    /** The values of the statistics by view; a dash where there is none yet. */
    fun counts(counts: Counts?): Map<Int, String> {
        val none = string(R.string.none)
        return mapOf(
            R.id.tokens_per_second to (counts?.tokensPerSecond?.let { string(R.string.number, it) } ?: none),
            R.id.acceptance to (counts?.acceptanceRate?.let { string(R.string.percent, it * 100) } ?: none),
            R.id.tokens_per_round to (counts?.tokensPerRound?.let { string(R.string.number_exact, it) } ?: none),
            R.id.last_drafted to (counts?.lastDrafted?.let { string(R.string.count, it) } ?: none),
            R.id.tokens_left to (counts?.let { string(R.string.count, it.tokensLeft) } ?: none),
        )
    }

    private fun problem(problem: Problem): String = when (problem) {
        is Problem.Refused -> problem.line
        is Problem.MemoryShort -> string(R.string.memory_short, size(problem.needed), size(problem.available))
        is Problem.Failed -> string(R.string.failed, problem.line)
        Problem.OutOfMemory -> string(R.string.out_of_memory)
        Problem.StoppedForMemory -> string(R.string.stopped_for_memory)
        Problem.ClosedForMemory -> string(R.string.closed_for_memory)
    }

    /** Without numbers that change all the time, which a screen reader would never finish; the bar shows them. */
    private fun work(work: Work): String = when (work.step) {
        Step.COPYING -> string(R.string.copying, size(work.total))
        Step.DOWNLOADING ->
            if (work.total == 0L) string(R.string.connecting) else string(R.string.downloading, size(work.total))
        Step.CHECKING -> string(R.string.checking, size(work.total))
        Step.LOADING -> string(R.string.loading)
        Step.MEASURING -> string(R.string.measuring, work.done + 1, work.total)
    }

    private fun comparison(result: Comparison): String {
        val equal = string(if (result.equal) R.string.tokens_equal else R.string.tokens_differ)
        return string(
            R.string.comparison, result.plain, result.drafted, result.ratio, result.runs, result.tokens, equal,
        )
    }

    private fun finished(counts: Counts): String {
        val reason = FINISHED[counts.finish]?.let(::string) ?: counts.finish
        val line = string(R.string.finished, counts.tokens, reason, counts.tokensLeft)
        return if (counts.droppedMessages == 0) line else "$line ${string(R.string.dropped, counts.droppedMessages)}"
    }

    private fun size(bytes: Long): String = Formatter.formatShortFileSize(context, bytes)

    private fun string(id: Int, vararg values: Any): String = context.getString(id, *values)

    private companion object {
        /** The reasons of `Stats.finishReason`. */
        val FINISHED = mapOf(
            "eos" to R.string.finished_eos,
            "length" to R.string.finished_length,
            "max_seq_len" to R.string.finished_full,
            "cancelled" to R.string.finished_cancelled,
        )
    }
}
