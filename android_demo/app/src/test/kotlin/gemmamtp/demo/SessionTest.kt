package gemmamtp.demo

import gemmamtp.core.InputError
import gemmamtp.core.WhenFull
import java.io.File
import java.util.concurrent.CountDownLatch
import java.util.concurrent.Executors
import java.util.concurrent.TimeUnit
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue

class SessionTest {
    private val worker = ManualWorker()
    private val opener = FakeOpener()
    private val installed = newFolder()
    private val seen = ArrayList<Screen>()
    private var free = 1000L
    private var low = false
    private val session: Session = Session(Bundles(installed, emptyList()), opener, { free }, { low }, worker) { see() }
    private val bundle = BundleFolder(File("pair"))
    private val model get() = opener.model

    private fun see() {
        seen.add(session.screen)
    }

    private fun opened() {
        assertTrue(session.open(bundle))
        worker.runAll()
    }

    private fun ask(prompt: String) {
        assertTrue(session.send(prompt))
        worker.runAll()
    }

    @Test
    fun opensWritesAndEndsReady() {
        opened()
        ask("hello")
        assertEquals(listOf(Phase.OPENING, Phase.READY, Phase.WRITING, Phase.READY), phases())
        assertEquals(listOf(Exchange("hello", "0 1 2 3 4 ")), session.screen.talk)
        assertEquals("eos", session.screen.counts?.finish)
        assertEquals(2.0, session.screen.counts?.tokensPerSecond)
        assertEquals("pair", session.screen.bundle)
    }

    @Test
    fun showsTheAnswerAsItGrows() {
        opened()
        seen.clear()
        ask("hello")
        val answers = seen.mapNotNull { it.talk.lastOrNull()?.answer }.distinct()
        assertEquals(listOf("", "0 ", "0 1 ", "0 1 2 ", "0 1 2 3 ", "0 1 2 3 4 "), answers)
    }

    @Test
    fun answersDifferAndGoOnInAFullContext() {
        opened()
        repeat(3) { ask("hello") }
        val options = model.options
        assertEquals(3, options.map { it.sampling.seed }.distinct().size)
        assertTrue(options.all { it.sampling.copy(seed = 0) == model.sampling })
        assertTrue(options.all { it.whenFull == WhenFull.SHIFT && it.maxNewTokens == model.contextTokens })
    }

    @Test
    fun requestsAreRefusedUnlessReady() {
        assertFalse(session.send("hello"))
        assertFalse(session.benchmark("hello"))
        opened()
        assertTrue(session.send("one"))
        assertFalse(session.send("two"))
        assertFalse(session.open(bundle))
        val source = FakeSource("other", tinyBundle())
        assertFalse(session.install(source))
        assertTrue(source.closed)
        worker.runAll()
        assertEquals(listOf(listOf("user: one")), model.prompts)
    }

    @Test
    fun aConversationIsPassedOnUntilItIsNew() {
        opened()
        ask("one")
        ask("two")
        session.newChat()
        ask("three")
        assertEquals(listOf("user: one", "assistant: 0 1 2 3 4 ", "user: two"), model.prompts[1])
        assertEquals(listOf("user: three"), model.prompts[2])
    }

    @Test
    fun draftingSetsTheNumberOfDrafts() {
        opened()
        for (drafting in Drafting.values()) {
            session.draft(drafting)
            ask("x")
        }
        assertEquals(listOf(0, 4, null), model.options.map { it.numDraftTokens })
        assertEquals(setOf(model.sampling to model.rules), model.options.map { it.sampling.copy(seed = 0) to it.rules }.toSet())
    }

    @Test
    fun aStoppedAnswerStaysInTheConversation() {
        opened()
        model.beforeToken = { if (it == 2) session.stop() }
        ask("one")
        assertEquals("0 1 2 ", session.screen.talk.single().answer)
        assertEquals("cancelled", session.screen.counts?.finish)
        model.beforeToken = {}
        ask("two")
        assertEquals(listOf("user: one", "assistant: 0 1 2 ", "user: two"), model.prompts[1])
        assertEquals("0 1 2 3 4 ", session.screen.talk.last().answer)
    }

    @Test
    fun stopBeforeTheWorkerBeginsIsNotLost() {
        opened()
        session.send("one")
        session.stop()
        worker.runAll()
        assertEquals("0 ", session.screen.talk.single().answer)
    }

    @Test
    fun theBackgroundStopsWritingAndMeasuringButNotOpening() {
        session.open(bundle)
        session.background()
        worker.runAll()
        assertEquals(Phase.READY, session.screen.phase)
        model.beforeToken = { if (it == 1) session.background() }
        ask("one")
        assertEquals("0 1 ", session.screen.talk.single().answer)
        session.benchmark("one")
        worker.runAll()
        assertEquals(Phase.READY, session.screen.phase)
        assertNull(session.screen.comparison)
        assertNull(session.screen.problem)
    }

    @Test
    fun anErrorIsOneLineAndEndsWithTheNextRequest() {
        opened()
        ask("bad")
        assertEquals(Problem.Refused("the prompt is bad; write a better one"), session.screen.problem)
        assertEquals(Phase.READY, session.screen.phase)
        ask("good")
        assertNull(session.screen.problem)
        assertEquals(listOf("user: good"), model.prompts.last(), "what has no answer is no part of the conversation")
    }

    @Test
    fun aBundleThatCannotBeOpenedLeavesNone() {
        opened()
        opener.failure = InputError("pair: not a bundle")
        opened()
        assertTrue(model.closed)
        assertEquals(Phase.IDLE, session.screen.phase)
        assertEquals(Problem.Refused("pair: not a bundle"), session.screen.problem)
        assertFalse(session.screen.canReopen)
    }

    @Test
    fun shortMemoryIsReportedBeforeOpeningAndCanBeOverruled() {
        opener.needed = 1001
        opened()
        assertEquals(Problem.MemoryShort(1001, 1000), session.screen.problem)
        assertEquals(Phase.IDLE, session.screen.phase)
        assertEquals(0, opener.opened)
        assertTrue(session.screen.canReopen)
        session.reopen()
        worker.runAll()
        assertEquals(Phase.READY, session.screen.phase)
        opener.needed = 1000
        opened()
        assertNull(session.screen.problem)
    }

    @Test
    fun outOfMemoryWhileOpeningOrWritingClosesTheBundle() {
        opener.failure = OutOfMemoryError()
        opened()
        assertEquals(Problem.OutOfMemory, session.screen.problem)
        assertEquals(Phase.IDLE, session.screen.phase)
        opener.failure = null
        session.reopen()
        worker.runAll()
        model.beforeToken = { if (it == 1) throw OutOfMemoryError() }
        ask("one")
        assertEquals(Problem.OutOfMemory, session.screen.problem)
        assertEquals(Phase.IDLE, session.screen.phase)
        assertTrue(model.closed)
    }

    @Test
    fun whateverFailsClosesTheBundleAndTheAppGoesOn() {
        for (failure in listOf(RuntimeException("the runtime is at fault\nand more"), IllegalStateException(), StackOverflowError(), java.io.IOException("x"), LinkageError("y"))) {
            opened()
            model.beforeToken = { if (it == 1) throw failure }
            ask("one")
            val line = failure.message?.substringBefore("\n") ?: failure.javaClass.simpleName
            assertEquals(Problem.Failed(line), session.screen.problem)
            assertEquals(Phase.IDLE, session.screen.phase)
            assertTrue(model.closed)
            opener.model = FakeModel()
            opener.failure = failure
            opened()
            assertEquals(Problem.Failed(line), session.screen.problem)
            opener.failure = null
            assertTrue(session.screen.canReopen)
            session.reopen()
            worker.runAll()
            ask("two")
            assertEquals("0 1 2 3 4 ", session.screen.talk.last().answer)
        }
    }

    @Test
    fun lowMemoryEndsATextAndAMeasurementAfterTheRoundAndKeepsTheBundle() {
        opened()
        model.beforeToken = { low = it == 1 }
        ask("one")
        assertEquals("0 1 ", session.screen.talk.single().answer)
        assertEquals(Problem.StoppedForMemory to Phase.READY, session.screen.problem to session.screen.phase)
        assertFalse(model.closed)
        session.benchmark("two")
        worker.runAll()
        assertEquals(Problem.StoppedForMemory to null, session.screen.problem to session.screen.comparison)
        model.beforeToken = { low = false }
        ask("three")
        assertEquals("0 1 2 3 4 " to null, session.screen.talk.last().answer to session.screen.problem)
    }

    @Test
    fun aSystemPromptBeginsConversationsOfBundlesThatChat() {
        session.instruct("Be brief.")
        opened()
        ask("one")
        ask("two")
        session.instruct("  ")
        ask("three")
        assertEquals(listOf("system: Be brief.", "user: one"), model.prompts[0])
        assertEquals("system: Be brief.", model.prompts[1][0])
        assertEquals("user: one", model.prompts[2][0])
        opener.model = FakeModel(chats = false)
        session.instruct("Be brief.")
        opened()
        ask("four")
        assertTrue(model.prompts.single().none { it.startsWith("system") })
    }

    @Test
    fun thoughtsAreShownApartWhereTheModelThinks() {
        opener.model = FakeModel(thinks = true)
        opened()
        session.think(true)
        ask("one")
        assertEquals(Exchange("one", "2 3 4 ", "0 1 "), session.screen.talk.single())
        session.think(false)
        ask("two")
        assertEquals("assistant: 2 3 4 ", model.prompts[1][1])
        assertEquals(listOf(true, false), model.thinking)
        opener.model = FakeModel()
        opened()
        session.think(true)
        ask("three")
        assertEquals(listOf(false), model.thinking)
    }

    @Test
    fun aDownloadThatIsRefusedSaysWhyAndTellsThatItEnded() {
        var ended = 0
        assertTrue(session.download("toy", "0".repeat(64)) { ended++ })
        assertEquals(0, ended)
        worker.runAll()
        assertEquals(1, ended)
        assertTrue("not the address" in (session.screen.problem as Problem.Refused).line)
    }

    @Test
    fun memoryShortOutOfViewClosesTheBundleAndKeepsTheConversation() {
        opened()
        model.beforeToken = { if (it == 1) session.leaveMemory() }
        ask("one")
        assertTrue(model.closed)
        assertEquals(Phase.IDLE, session.screen.phase)
        assertEquals(Problem.ClosedForMemory, session.screen.problem)
        opener.model = FakeModel()
        assertTrue(session.screen.canReopen)
        session.reopen()
        worker.runAll()
        ask("two")
        assertEquals(listOf("user: one", "assistant: 0 1 ", "user: two"), model.prompts.single())
        session.leaveMemory()
        session.send("three")
        worker.runAll()
        assertFalse(model.closed, "it was used again before it was closed")
    }

    @Test
    fun memoryShortOutOfViewStopsOpeningAndReportsIt() {
        session.open(bundle)
        session.leaveMemory()
        worker.runAll()
        assertEquals(Phase.IDLE, session.screen.phase)
        assertEquals(Problem.ClosedForMemory, session.screen.problem)
        session.reopen()
        worker.runAll()
        assertEquals(Phase.READY, session.screen.phase)
    }

    @Test
    fun memoryShortDoesNotStopACopy() {
        session.install(FakeSource("toy", tinyBundle()))
        session.leaveMemory()
        worker.runAll()
        assertEquals(Phase.READY, session.screen.phase)
        assertNull(session.screen.problem)
    }

    @Test
    fun anotherBundleBeginsAnotherConversation() {
        opened()
        ask("one")
        opened()
        assertEquals(1, session.screen.talk.size)
        session.open(BundleFolder(File("other")))
        worker.runAll()
        assertEquals(emptyList(), session.screen.talk)
    }

    @Test
    fun installsThenOpens() {
        val source = FakeSource("toy", tinyBundle())
        session.install(source)
        worker.runAll()
        assertEquals(listOf(Phase.COPYING, Phase.OPENING, Phase.READY), phases())
        val steps = seen.mapNotNull { it.work?.step }.distinct()
        assertEquals(listOf(Step.COPYING, Step.LOADING, Step.CHECKING), steps)
        assertEquals("toy", session.screen.bundle)
        assertTrue(source.closed)
    }

    @Test
    fun aStoppedCopyLeavesNoBundleAndNoProblem() {
        val source = FakeSource("toy", tinyBundle())
        session.install(source)
        session.stop()
        worker.runAll()
        assertEquals(Phase.IDLE, session.screen.phase)
        assertNull(session.screen.problem)
        assertFalse(File(installed, "toy").exists())
        assertTrue(source.closed)
    }

    @Test
    fun benchmarksWithoutTouchingTheConversation() {
        opened()
        ask("one")
        session.draft(Drafting.OFF)
        session.benchmark("two")
        worker.runAll()
        val comparison = checkNotNull(session.screen.comparison)
        assertEquals(2.0, comparison.ratio)
        assertEquals(1, session.screen.talk.size)
        assertEquals(setOf<Int?>(0, 4), model.options.drop(1).map { it.numDraftTokens }.toSet())
        assertEquals(Phase.READY, session.screen.phase)
    }

    @Test
    fun stopsFromAnotherThread() {
        val thread = Executors.newSingleThreadExecutor()
        val written = CountDownLatch(1)
        val done = CountDownLatch(1)
        opener.model = FakeModel(length = Int.MAX_VALUE)
        lateinit var session: Session
        session = Session(Bundles(installed, emptyList()), opener, { free }, { false }, thread) {
            if (session.screen.ready && session.screen.talk.isNotEmpty()) done.countDown()
        }
        session.open(bundle)
        thread.submit {}.get(10, TimeUnit.SECONDS)
        model.beforeToken = { if (it == 3) written.countDown() }
        session.send("one")
        assertTrue(written.await(10, TimeUnit.SECONDS))
        session.stop()
        assertTrue(done.await(10, TimeUnit.SECONDS))
        thread.shutdown()
    }

    private fun phases() =
        seen.map { it.phase }.fold(listOf<Phase>()) { all, new -> if (all.lastOrNull() == new) all else all + new }
}
