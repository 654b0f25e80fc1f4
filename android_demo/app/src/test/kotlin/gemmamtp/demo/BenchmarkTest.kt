package gemmamtp.demo

import gemmamtp.core.InputError
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue

class BenchmarkTest {
    private fun runs(vararg seconds: Double) = seconds.map { Run(listOf(1, 2, 3, 4, 5), it) }

    private fun measure(model: FakeModel) = benchmark(model, "x", 4, {}) { text ->
        text.asSequence().map { it.id }.toList()
    }

    @Test
    fun theRatioIsTheMedianWithinTurns() {
        // Throttled by half in the last turn: medians of the rates would say 2, within turns it is 4, 2, 2.
        val result = compare(runs(4.0, 4.0, 8.0), runs(1.0, 2.0, 4.0))
        assertEquals(1.0, result.plain)
        assertEquals(2.0, result.drafted)
        assertEquals(2.0, result.ratio)
        assertEquals(5, result.tokens)
        assertEquals(3, result.runs)
        assertEquals(3.0, compare(runs(4.0, 8.0, 30.0), runs(2.0, 2.0, 10.0)).ratio)
    }

    @Test
    fun theMedianOfAnEvenNumberIsTheMeanOfTheMiddle() {
        assertEquals(2.5, median(listOf(9.0, 2.0, 3.0, 1.0)))
        assertEquals(7.0, median(listOf(7.0)))
    }

    @Test
    fun oneOtherTokenIsNotEqual() {
        assertTrue(compare(runs(1.0), runs(1.0)).equal)
        assertFalse(compare(runs(1.0), listOf(Run(listOf(1, 2, 3, 4, 6), 1.0))).equal)
        val model = FakeModel(length = 100)
        model.token = { options, at -> if (at == 40 && options.numDraftTokens != 0) 7 else at }
        assertFalse(measure(model).equal)
    }

    @Test
    fun runsAlternateAfterAWarmUpGreedyAndFromTheBeginning() {
        val model = FakeModel(length = 100)
        val result = measure(model)
        val drafts = model.options.map { it.numDraftTokens }
        assertEquals(listOf<Int?>(0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0), drafts)
        assertEquals(BENCHMARK_RUNS, result.runs)
        assertEquals(drafts.size, model.forgotten)
        assertEquals(setOf(0.0), model.options.map { it.sampling.temperature }.toSet())
        assertEquals(BENCHMARK_TOKENS, result.tokens)
        assertEquals(1.0, result.plain)
        assertEquals(2.0, result.ratio)
    }

    @Test
    fun theWarmUpDoesNotCount() {
        val model = FakeModel(length = 100)
        model.token = { options, at -> if (model.options.size <= 2) -1 else at }
        assertTrue(measure(model).equal)
    }

    @Test
    fun anAnswerOfOneTokenCannotBeTimed() {
        val line = assertFailsWith<InputError> { measure(FakeModel(length = 1)) }.message.orEmpty()
        assertTrue("try another prompt" in line, line)
    }
}
