package gemmamtp.core

import gemmamtp.download.bundleOf
import gemmamtp.download.bytes
import gemmamtp.download.put
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Deferred
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import java.io.File
import java.util.concurrent.CountDownLatch
import java.util.concurrent.atomic.AtomicInteger
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue

class FlowsTest {
    private val scope = CoroutineScope(Dispatchers.Default)

    private fun prompt(seed: Int, size: Int) = IntArray(size) { (it * 7 + seed) % FAKE_VOCAB }

    private fun ids(stream: Stream) = runBlocking { stream.flow().map { it.id }.toList() }

    private fun assertRight(prompt: IntArray, written: List<Int>) {
        val text = prompt.toMutableList()
        for (token in written) text.add(token.also { assertEquals(chosenAfter(text), it) })
    }

    @Test
    fun aFlowHasTheTokensOfTheText() = inTemporaryDirectory { directory ->
        val decoder = FakeBundle(directory).decoder()
        for (drafts in listOf(0, 3, null)) {
            val options = Options(30, drafts, Sampling(temperature = 1.0, seed = 3))
            val expected = decoder.conversation().stream(prompt(1, 50), options).asSequence().map { it.id }.toList()
            val stream = decoder.stream(prompt(1, 50), options)
            assertEquals(expected, ids(stream))
            assertEquals("length", stream.stats.finishReason)
        }
    }

    @Test
    fun severalAreCollectedAtOnceAndTakeTurns() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val prompts = List(4) { prompt(it, 40 + 50 * it) }
        val texts = prompts.map { scope.async { decoder.conversation().stream(it, Options(30, 2)).flow().map { it.id }.toList() } }
        runBlocking { texts.zip(prompts) { text, prompt -> assertRight(prompt, text.await().also { assertEquals(30, it.size) }) } }
    }

    /** Cancel while a pass runs: the collector ends after it, and the conversation goes on. */
    private fun cancelled(text: Stream, bundle: FakeBundle, passes: Int): List<Int> {
        val given = ArrayList<Int>()
        var left = passes
        val began = CountDownLatch(1)
        val mayEnd = CountDownLatch(1)
        bundle.target.inPass = {
            if (left-- == 0) {
                began.countDown()
                mayEnd.await()
            }
        }
        val before = bundle.target.passes
        val job = scope.async { text.flow().collect { given.add(it.id) } }
        began.await()
        job.cancel()
        assertFalse(job.isCompleted)
        mayEnd.countDown()
        assertFailsWith<CancellationException> { runBlocking { job.await() } }
        assertEquals(passes + 1, bundle.target.passes - before)
        assertEquals("cancelled", text.stats.finishReason)
        assertFalse(text.hasNext())
        return given
    }

    @Test
    fun cancelledInItsPromptATextEndsAfterTheChunkThatRuns() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        assertEquals(emptyList(), cancelled(decoder.stream(prompt(2, 160), Options()), bundle, 3))
        val again = decoder.stream(prompt(2, 160), Options(20))
        assertRight(prompt(2, 160), ids(again))
        assertEquals(64, again.stats.reusedTokens)
    }

    @Test
    fun cancelledInARoundATextEndsAfterItsPass() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val given = cancelled(decoder.stream(prompt(3, 20), Options(50, 0)), bundle, 5)
        assertTrue(given.size in 3..4, "$given")
        assertRight(prompt(3, 20), given)
        assertRight(prompt(3, 20), ids(decoder.stream(prompt(3, 20), Options(50, 3))))
    }

    @Test
    fun whoTakesAFewTokensOrFailsEndsTheText() = inTemporaryDirectory { directory ->
        val decoder = FakeBundle(directory).decoder()
        val text = decoder.stream(prompt(4, 20), Options(50, 0))
        val few = runBlocking { text.flow().take(3).map { it.id }.toList() }
        assertEquals(3, few.size)
        assertRight(prompt(4, 20), few)
        assertTrue(text.tokens.size <= 4, "at most one token ahead")
        val other = decoder.stream(prompt(4, 20), Options(50, 0))
        assertFailsWith<ArithmeticException> { runBlocking { other.flow().collect { throw ArithmeticException() } } }
        assertEquals("cancelled" to "cancelled", text.stats.finishReason to other.stats.finishReason)
        assertRight(prompt(4, 20), ids(decoder.stream(prompt(4, 20), Options(50, 2))))
    }

    @Test
    fun aTextIsCollectedOnce() = inTemporaryDirectory { directory ->
        val flow = FakeBundle(directory).decoder().stream(prompt(4, 20), Options(5)).flow()
        runBlocking { flow.toList() }
        assertTrue("collected already" in assertFailsWith<IllegalStateException> { runBlocking { flow.toList() } }.message!!)
    }

    @Test
    fun whatATextThrowsIsThrownToTheCollector() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        bundle.target.left = 4
        val text = decoder.stream(prompt(5, 20), Options(50, 0))
        assertEquals("the graph cannot run", assertFailsWith<InputError> { ids(text) }.message)
        assertRight(prompt(5, 20), text.tokens)
        assertRight(prompt(5, 20), ids(decoder.stream(prompt(5, 20), Options(50, 0))))
    }

    @Test
    fun closingWaitsForThePassAndEndsWhatIsCollected() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val held = Held(bundle.target)
        val text = scope.async { decoder.stream(prompt(6, 160), Options()).flow().toList() }
        held.begins()
        val closing = scope.async { decoder.closeAndJoin() }
        closing.cancel() // in vain, from when it began
        assertFalse(bundle.target.closed)
        held.go()
        val error = assertFailsWith<IllegalStateException> { runBlocking { withClosed(decoder, closing, text) } }
        assertEquals("the decoder was closed; open the bundle again", error.message)
        assertTrue(bundle.target.closed && bundle.drafter.closed)
    }

    private suspend fun withClosed(decoder: Decoder, closing: Deferred<Unit>, text: Deferred<List<Token>>) {
        closing.join()
        decoder.closeAndJoin() // it may have been cancelled before it began
        text.await()
    }

    private class Counted(private val open: AtomicInteger) : BoundGraph {
        init {
            open.incrementAndGet()
        }

        override fun bind(cache: Map<String, Tensor>) = Unit
        override fun run(inputs: Map<String, Tensor>) = emptyMap<String, Tensor>()
        override fun close() {
            open.decrementAndGet()
        }
    }

    private fun folder(directory: File) = File(directory, "bundle").also { put(it, bundleOf("w" to bytes(1, 100_000))) }

    @Test
    fun aBundleIsLoadedOnAThreadOfItsOwn() = inTemporaryDirectory { directory ->
        val open = AtomicInteger()
        var thread = Thread.currentThread()
        val load = LoadGraphs { _, _, threads ->
            assertEquals(3, threads)
            thread = Thread.currentThread()
            mapOf("target" to Counted(open), "drafter" to Counted(open))
        }
        runBlocking {
            val decoder = loadDecoder(folder(directory), load, threads = 3)
            assertEquals("gemma-mtp" to 7, thread.name to thread.priority)
            assertEquals(2, open.get())
            decoder.closeAndJoin()
            assertEquals(0, open.get())
            val error = assertFailsWith<InputError> { loadDecoder(File(directory, "none"), load) }
            assertTrue("not a bundle" in error.message!!)
        }
    }

    @Test
    fun whatWasLoadedForNobodyIsClosed() = inTemporaryDirectory { directory ->
        val open = AtomicInteger()
        val began = CountDownLatch(1)
        val mayEnd = CountDownLatch(1)
        val load = LoadGraphs { _, _, _ ->
            began.countDown()
            mayEnd.await()
            mapOf("target" to Counted(open))
        }
        val loading = scope.async { loadDecoder(folder(directory), load) }
        began.await()
        loading.cancel()
        assertEquals(0, open.get())
        mayEnd.countDown()
        assertFailsWith<CancellationException> { runBlocking { loading.await() } }
        runBlocking { loading.join() }
        assertEquals(0, open.get())
    }

    @Test
    fun loadingIsCancelledWhileFilesAreChecked() = inTemporaryDirectory { directory ->
        val load = LoadGraphs { _, _, _ -> throw AssertionError("it was not cancelled") }
        val place = folder(directory)
        lateinit var loading: Deferred<Decoder>
        val begun = CountDownLatch(1)
        loading = scope.async {
            loadDecoder(place, load) { _, _ ->
                begun.await()
                loading.cancel()
            }
        }
        begun.countDown()
        assertFailsWith<CancellationException> { runBlocking { loading.await() } }
        runBlocking { loading.join() }
    }
}
