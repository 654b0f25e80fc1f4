package gemmamtp.core

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

private const val VOCAB = 200
private const val BEGIN = 190
private const val END = 191
private val SAMPLED = Sampling(1.2, 0.97, seed = 5)
private val CHANNELS = mapOf(THOUGHT to (BEGIN to END), "aside" to (192 to 193))

/** Thoughts end with their budget, whatever is drafted. */
class ThinkingTest {
    private fun limit(maxTokens: Int, prompt: List<Int> = emptyList()) =
        ThoughtLimit(PartTracker(CHANNELS, prompt = prompt), BEGIN to END, maxTokens)

    @Test
    fun theEndIsForcedAfterTheLastTokenOfTheBudget() {
        val limit = limit(2)
        // Marks and other parts do not count.
        for (token in listOf(1, BEGIN, 1, END, 1, 192, 1, 193, BEGIN)) {
            assertEquals(null, limit.forced)
            limit.commit(token)
        }
        limit.commit(1)
        assertEquals(END, limit.forced)
        limit.commit(END)
        assertEquals(null, limit.forced)
        assertEquals(BEGIN, limit.forbidden) // nothing is left for another thought
        assertEquals(null, limit(1).forbidden)
        assertEquals(1, limit.numAllowed(listOf(5, BEGIN)))
        assertEquals(END, limit(0, listOf(5, BEGIN)).forced)
    }

    @Test
    fun draftsBeforeTheFirstThatIsNotTheEnd() {
        val limit = limit(2)
        repeat(2) { // asking changes nothing
            assertEquals(3, limit.numAllowed(listOf(BEGIN, 1, 2, 3, 4)))
            assertEquals(5, limit.numAllowed(listOf(BEGIN, 1, 2, END, 3)))
            assertEquals(4, limit.numAllowed(listOf(1, 2, 3, 4)))
        }
        listOf(BEGIN, 1, 2).forEach(limit::commit)
        assertEquals(2, limit.numAllowed(listOf(END, 5)))
        assertEquals(0, limit.numAllowed(listOf(5, END)))
        assertEquals(0, limit.numAllowed(emptyList()))
    }

    @Test
    fun tenThousandSampledTokensAreThoseOfPlainDecoding() = inTemporaryDirectory { directory ->
        val engine = HashedEngine(directory, VOCAB, channels = CHANNELS)
        val rules = Rules(logitBias = mapOf(BEGIN to 12.0, END to -4.0)) // many thoughts, which seldom end by themselves
        for ((prompt, budget) in listOf(PROMPT to 100, listOf(3, 5, BEGIN) to 40, listOf(3, 5, BEGIN) to 0)) {
            fun write(count: Int, drafts: Int?, stats: Stats = Stats()) =
                write(engine, Options(count, drafts, SAMPLED, rules, budget), stats, prompt)
            engine.answer = emptyList()
            val plain = write(10_000, 0)
            val tracker = PartTracker(CHANNELS, prompt = prompt)
            assertEquals(budget, plain.map(tracker::add).count { it == THOUGHT to false })
            engine.answer = plain
            val stats = Stats()
            assertEquals(plain, write(10_000, 5, stats))
            assertTrue(stats.acceptanceRate!! in 0.1..0.9, "${stats.acceptanceRate} accepted")
            stats.sources[GRAMMAR]?.let { assertEquals(it.drafted, it.accepted) }
            val planned = Stats()
            assertEquals(plain.take(1000), write(1000, null, planned))
            planned.sources[GRAMMAR]?.let { assertEquals(it.drafted, it.accepted) }
        }
    }

    @Test
    fun impossibleBudgets() {
        val thinks = smallManifest(VOCAB, 100, 8, channels = CHANNELS)
        val negative = assertFailsWith<InputError> { checkOptions(thinks, Options(thinkingBudget = -1)) }
        assertEquals("the thinking budget is -1 tokens, expected 0 or more", negative.message)
        val none = assertFailsWith<InputError> { checkOptions(smallManifest(VOCAB, 100, 8), Options(thinkingBudget = 0)) }
        assertEquals(
            "a thinking budget is about thoughts, and the bundle's chat template marks none; leave it out",
            none.message,
        )
    }
}
