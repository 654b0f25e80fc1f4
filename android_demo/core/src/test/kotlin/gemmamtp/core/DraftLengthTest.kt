package gemmamtp.core

import java.io.File
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Drafting adapts, and stays within its allowance; hosttest compares the plans with Python's. */
class DraftLengthTest {
    private fun verifySeconds(drafts: Int) = 1 + 0.2 * drafts
    private val stepSeconds = 0.1

    /** Time of a text relative to plain decoding, if each draft is accepted with probability [chance]. */
    private fun simulate(chance: Double, tokens: Int = 600): Double {
        val random = Random(1)
        val planner = DraftLength(8, Costs(8))
        var seconds = 0.0
        var written = 0
        while (written < tokens) {
            val plan = planner.plan(listOf(DRAFTER to 8))
            val drafted = plan.numDraftTokens
            val accepted = (0 until drafted).firstOrNull { random.nextDouble() >= chance } ?: drafted
            planner.costs.record(drafted, verifySeconds(drafted), drafted * stepSeconds)
            planner.recordLoss(plan, accepted + 1, drafted)
            planner.learn(DRAFTER, drafted, accepted)
            seconds += verifySeconds(drafted) + drafted * stepSeconds
            written += accepted + 1
        }
        return seconds / written
    }

    @Test
    fun notSlowerAndFasterWhereDraftsAreAccepted() {
        assertTrue(simulate(0.0) <= 1.01 + 2.0 / 600)
        assertTrue(simulate(0.9) < 0.6)
    }

    @Test
    fun draftsThatAreNotVerifiedCostNoLongerPass() {
        val planner = DraftLength(8, Costs(8))
        repeat(2) { for (drafts in listOf(0, 8)) planner.costs.record(drafts, verifySeconds(drafts)) }
        repeat(20) { planner.recordLoss(Plan("lookup", 8), 1, verified = 0) } // rounds as cheap as plain ones
        assertTrue(planner.plan(listOf("lookup" to 8)).numDraftTokens > 0)
        repeat(2) { planner.recordLoss(Plan("lookup", 8), 1, verified = 8) }
        assertEquals(0, planner.plan(listOf("lookup" to 8)).numDraftTokens)
    }

    @Test
    fun costsAreInterpolated() {
        val costs = Costs(8, rowMultiple = 2)
        assertEquals(0, costs.nextToMeasure(8))
        repeat(2) { for (drafts in listOf(0, 2, 4, 8)) costs.record(drafts, 1.0 + drafts, 0.5 * drafts) }
        assertEquals(null, costs.nextToMeasure(8))
        costs.record(4, 50.0, 9.0) // an accident, which does not count
        assertEquals(1.0, costs.verifySeconds(1)) // padded to the same pass
        assertEquals(7.0, costs.verifySeconds(6)) // half way from 6 tokens' 5 seconds to 10 tokens' 9
        assertEquals(7.0, costs.relative(DRAFTER, 4)) // the pass, and four steps
        assertEquals(3.0, costs.relative("lookup", 2))
    }

    @Test
    fun costsAreSavedForTheSameBundleAndThreads() = inTemporaryDirectory { directory ->
        val manifest = smallManifest(10, 100, 8)
        val file = File(directory, "costs.json")
        val costs = Costs(8)
        repeat(2) { for (drafts in listOf(0, 1, 2, 4, 8)) costs.record(drafts, 1.0 + drafts, 0.5 * drafts) }
        saveCosts(costs, file, manifest, 2)
        assertEquals(listOf("costs.json"), directory.list()!!.toList())
        val again = loadCosts(file, manifest, 2)
        assertEquals(listOf(null, 4.0, 0.5), listOf(again.nextToMeasure(8), again.verifySeconds(3), again.stepSeconds))
        assertEquals(0, loadCosts(file, manifest, 1).nextToMeasure(8))
        file.writeText("{\"of\": {\"bundle\": \"\", \"threads\": 2}, \"verify_seconds\": {\"1\": -1}}")
        assertTrue("not the costs of a bundle" in assertFailsWith<InputError> { loadCosts(file, manifest, 2) }.message!!)
    }
}
