package gemmamtp.demo

import android.content.Context
import android.text.format.Formatter

/** What the screen says, in the user's language and number format. */
class Words(private val context: Context) {
    /** One line or a few: what is wrong, what is going on, what came out, or what to do next. */
    fun status(screen: Screen): String {
        val work = screen.work
        val comparison = screen.comparison
        return when {
            screen.problem != null -> problem(screen.problem)
            screen.busy && work != null -> work(work)
            screen.phase == Phase.COPYING || screen.phase == Phase.OPENING -> say(R.string.opening)
            screen.phase == Phase.WRITING -> say(R.string.writing)
            screen.phase == Phase.BENCHMARKING -> say(R.string.benchmarking)
            screen.phase == Phase.IDLE -> say(R.string.no_bundle)
            comparison != null -> comparison(comparison)
            screen.counts?.finish.isNullOrEmpty() -> say(if (screen.chats) R.string.ready_chat else R.string.ready_text)
            else -> finished(screen.counts)
        }
    }

    /** The statistics' values by view; a dash where there is none yet. */
    fun counts(counts: Counts?): Map<Int, String> {
        val none = say(R.string.none)
        return mapOf(
            R.id.tokens_per_second to (counts?.tokensPerSecond?.let { say(R.string.number, it) } ?: none),
            R.id.acceptance to (counts?.acceptanceRate?.let { say(R.string.percent, it * 100) } ?: none),
            R.id.tokens_per_round to (counts?.tokensPerRound?.let { say(R.string.number_exact, it) } ?: none),
            R.id.last_drafted to (counts?.lastDrafted?.let { say(R.string.count, it) } ?: none),
        )
    }

    private fun problem(problem: Problem): String = when (problem) {
        is Problem.Refused -> problem.line
        is Problem.MemoryShort -> say(R.string.memory_short, size(problem.needed), size(problem.available))
        Problem.OutOfMemory -> say(R.string.out_of_memory)
        Problem.StoppedForMemory -> say(R.string.stopped_for_memory)
        Problem.ClosedForMemory -> say(R.string.closed_for_memory)
    }

    /** Without what changes all the time, which a screen reader would never finish; the bar shows that. */
    private fun work(work: Work): String = when (work.step) {
        Step.COPYING -> say(R.string.copying, size(work.total))
        Step.CHECKING -> say(R.string.checking, size(work.total))
        Step.LOADING -> say(R.string.loading)
        Step.MEASURING -> say(R.string.measuring, work.done + 1, work.total)
    }

    private fun comparison(found: Comparison): String {
        val equal = say(if (found.equal) R.string.tokens_equal else R.string.tokens_differ)
        return say(
            R.string.comparison, found.plain, found.drafted, found.ratio, found.runs, found.tokens, equal,
        )
    }

    private fun finished(counts: Counts): String {
        val reason = FINISHED[counts.finish]?.let(::say) ?: counts.finish
        return say(R.string.finished, counts.tokens, reason)
    }

    private fun size(bytes: Long): String = Formatter.formatShortFileSize(context, bytes)

    private fun say(id: Int, vararg values: Any): String = context.getString(id, *values)

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
