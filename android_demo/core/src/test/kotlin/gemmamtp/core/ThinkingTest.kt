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
        assertEquals(listOf(END), listOf(1, BEGIN, END, 192).filter(limit::allows))
        limit.commit(END)
        assertEquals(null, limit.forced)
        assertEquals(listOf(1, END, 192), listOf(1, BEGIN, END, 192).filter(limit::allows)) // nothing is left for another
        limit.commit(192)
        assertTrue(limit.allows(BEGIN)) // in another channel it begins nothing
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
        assertEquals(2, limit.numAllowed(listOf(END, 5, BEGIN)))
        assertEquals(0, limit.numAllowed(listOf(5, END)))
        assertEquals(0, limit.numAllowed(emptyList()))
    }

    @Test
    fun tenThousandSampledTokensAreThoseOfPlainDecoding() = inTemporaryDirectory { directory ->
        val engine = HashedEngine(directory, VOCAB, channels = CHANNELS)
        val rules = Rules(logitBias = mapOf(BEGIN to 12.0, END to -4.0)) // many thoughts, which seldom end by themselves
        for ((prompt, budget) in listOf(PROMPT to 900, listOf(3, 5, BEGIN) to 40, listOf(3, 5, BEGIN) to 0)) {
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
            assertEquals(plain.take(1000), write(1000, null))
        }
    }

    @Test
    fun theForcedEndIsADraft() = inTemporaryDirectory { directory ->
        val engine = HashedEngine(directory, VOCAB, channels = CHANNELS)
        for ((budget, drafts) in listOf(1 to 4, 2 to 1)) {
            val stats = Stats()
            // The prefill gives the first token of the thought, so a round begins where the end is forced.
            val rules = Rules(suppressed = setOf(BEGIN))
            val tokens = write(engine, Options(30, drafts, SAMPLED, rules, budget), stats, listOf(3, 5, BEGIN))
            assertEquals(END, tokens[budget])
            assertEquals(listOf(1, 1), stats.sources.getValue(GRAMMAR).let { listOf(it.drafted, it.accepted) })
        }
        val costs = Costs(8)
        repeat(2) { for (drafts in listOf(0, 1, 2, 4, 8)) costs.record(drafts, 1 + 0.2 * drafts, 0.1 * drafts) }
        val rules = RuledChooser(SAMPLED, Rules(), PROMPT, VOCAB, engine::score, limit(0, listOf(BEGIN)))
        val planned = PlannedDrafts(engine, DraftLength(8, costs), PROMPT, rules)
        assertEquals(listOf(END) to GRAMMAR, planned.make(BEGIN, 1) to planned.source)
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
