package gemmamtp.core

import java.io.File
import java.util.Collections
import java.util.concurrent.locks.ReentrantLock
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CompletableDeferred
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Deferred
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.async
import kotlinx.coroutines.awaitAll
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking

private const val CLOSED = "the decoder was closed; open the bundle again"
private const val CHUNKS = 10 // of the prompt

/** A decoder in coroutines gives what the blocking one gives, whenever a collector is cancelled. */
class FlowsTest {
    private val prompt = List(16 * CHUNKS) { it * 7 % FAKE_VOCAB }
    private val scope = CoroutineScope(SupervisorJob() + Dispatchers.Default)

    private suspend fun ids(stream: Stream) = stream.asFlow().map { it.id }.toList()

    private fun <T> Deferred<T>.error(): Throwable = assertFailsWith<Throwable> { runBlocking { await() } }

    /** The next text of a conversation is right, and so many tokens are not run again. */
    private fun checkGoesOn(conversation: Conversation, text: List<Int>, reused: Int) = runBlocking {
        val whole = (text + 3).toMutableList()
        val stream = conversation.stream(whole.toIntArray(), Options(20, 3))
        for (id in ids(stream)) whole.add(id.also { assertEquals(chosenAfter(whole), it) })
        assertEquals(text.size + 21, whole.size)
        assertTrue(stream.stats.reusedTokens >= reused, "${stream.stats.reusedTokens} reused, expected $reused")
    }

    @Test
    fun tokensAndRoundsAreThoseOfTheIterator() = inTemporaryDirectory { directory ->
        for (drafts in listOf(0, 3, null)) for (temperature in listOf(0.0, 1.0)) {
            val (expected, found) = List(2) {
                val options = Options(60, drafts, Sampling(temperature, seed = 7))
                FakeBundle(directory).decoder().stream(prompt.toIntArray(), options)
            }
            val tokens = expected.asSequence().map { it.id to expected.lastRound!!.drafts }.toList()
            assertEquals(tokens, runBlocking { found.asFlow().map { it.id to found.lastRound!!.drafts }.toList() })
            assertEquals("length" to expected.stats.rounds, found.stats.finishReason to found.stats.rounds)
        }
    }

    @Test
    fun passesRunOnDaemonsOfRaisedPriorityThatEndWithTheDecoder() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val threads = Collections.synchronizedSet(HashSet<Thread>())
        bundle.target.inPass = { threads.add(Thread.currentThread()) }
        val decoder = bundle.decoder()
        runBlocking {
            assertEquals(40, ids(decoder.stream(prompt.toIntArray(), Options(40))).size)
            decoder.closeAndJoin()
        }
        val found = threads.map { Triple(it.name, it.isDaemon, it.priority) }
        assertEquals(setOf(Triple("gemma-mtp-decoder", true, 7)), found.toSet())
        threads.forEach { it.join() }
    }

    /** A prompt ends with the chunk that runs, an answer with the round; the collector waits for it, and gets no more. */
    @Test
    fun aCollectorIsCancelledInAnyPass() = inTemporaryDirectory { directory ->
        for (pass in listOf(0, 1, CHUNKS - 1, CHUNKS, CHUNKS + 4)) for (drafts in listOf(0, 3)) {
            val bundle = FakeBundle(directory)
            val held = Held(bundle.target, pass)
            val conversation = bundle.decoder().conversation()
            val stream = conversation.stream(prompt.toIntArray(), Options(50, drafts))
            val collected = ArrayList<Int>()
            val job = scope.launch { stream.asFlow().collect { collected.add(it.id) } }
            held.begins()
            job.cancel()
            assertFalse(job.isCompleted)
            held.go()
            runBlocking { job.join() }
            assertEquals(pass + 1, bundle.target.passes)
            assertEquals("cancelled", stream.stats.finishReason)
            assertEquals(if (pass < CHUNKS) 0 else collected.size + 1, stream.tokens.size)
            assertEquals(collected, stream.tokens.take(collected.size))
            assertFalse(stream.hasNext())
            checkGoesOn(conversation, prompt + stream.tokens, minOf(16 * (pass + 1), prompt.size))
        }
    }

    @Test
    fun aCollectorThatHasEnoughOrFailsEndsTheTextThere() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val conversation = bundle.decoder().conversation()
        class Failed : Exception()
        val ends = listOf<suspend (Stream) -> Unit>(
            { it.asFlow().first() },
            { it.asFlow().take(7).toList() },
            { assertFailsWith<Failed> { it.asFlow().collect { _ -> if (it.tokens.size == 9) throw Failed() } } },
        )
        for ((end, count) in ends.zip(listOf(1, 7, 9))) {
            val stream = conversation.stream(prompt.toIntArray(), Options(50, 3))
            runBlocking { end(stream) }
            assertEquals(count to "cancelled", stream.tokens.size to stream.stats.finishReason)
            assertFalse(stream.hasNext())
            checkGoesOn(conversation, prompt + stream.tokens, prompt.size)
        }
    }

    @Test
    fun cancellingTheStreamGivesItsLastToken() = inTemporaryDirectory { directory ->
        val stream = FakeBundle(directory).decoder().stream(prompt.toIntArray(), Options(50, 3))
        val given = ArrayList<Int>()
        runBlocking { stream.asFlow().collect { if (given.apply { add(it.id) }.size == 5) stream.cancel() } }
        assertEquals(6, given.size)
        assertEquals(stream.tokens, given)
        assertEquals("cancelled", stream.stats.finishReason)
    }

    @Test
    fun noPassRunsBeforeItsTokenIsAskedFor() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val stream = decoder.stream(prompt.toIntArray(), Options(20, 0))
        val flow = stream.asFlow()
        assertEquals(0, bundle.target.passes)
        runBlocking {
            flow.collect { assertEquals(CHUNKS + stream.tokens.size - 1, bundle.target.passes) }
            val again = assertFailsWith<IllegalStateException> { stream.asFlow().collect {} }
            assertTrue("is collected already" in again.message!!)
            val ahead = decoder.stream(prompt.toIntArray(), Options(20, 0))
            val second = CompletableDeferred<Unit>()
            bundle.target.inPass = { if (ahead.tokens.size == 1) second.complete(Unit) }
            ahead.asFlow().buffer(1).collect { second.await() } // else it would wait for ever
        }
    }

    @Test
    fun conversationsAreCollectedAtOnceAndLongPromptsGiveWay() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val conversation = decoder.conversation()
        val other = conversation.stream(intArrayOf(3, 4), Options(50, 0))
        other.next()
        val turns = Collections.synchronizedList(ArrayList<Boolean>())
        val held = Held(bundle.target)
        val hold = bundle.target.inPass
        bundle.target.inPass = { turns.add(decoder.engine.cache === conversation.cache).also { hold() } }
        val reader = scope.async { ids(decoder.stream(prompt.toIntArray(), Options(9, 3))) }
        held.begins()
        val writer = scope.async { ids(other) }
        while (Thread.getAllStackTraces().none(::waitsForTurn)) Thread.yield()
        held.go()
        val (read, written) = runBlocking { listOf(reader, writer).awaitAll() }
        assertEquals(listOf(false, true, false), turns.take(3))
        for ((before, ids) in listOf(prompt to read, listOf(3, 4, other.tokens[0]) to written)) {
            val text = before.toMutableList()
            for (id in ids) text.add(id.also { assertEquals(chosenAfter(text), it) })
        }
        assertEquals(9 to 49, read.size to written.size)
    }

    private fun waitsForTurn(thread: Map.Entry<Thread, Array<StackTraceElement>>): Boolean {
        val classes = thread.value.map { it.className }
        val waits = classes.zipWithNext().any { it == ReentrantLock::class.java.name to Decoder::class.java.name }
        return waits && thread.key.state == Thread.State.WAITING
    }

    @Test
    fun closingWaitsForThePassAndBlocksNoThread() = inTemporaryDirectory { directory ->
        for (pass in listOf(0, CHUNKS, CHUNKS + 4)) {
            val bundle = FakeBundle(directory)
            val decoder = bundle.decoder()
            val held = Held(bundle.target, pass)
            val conversation = decoder.conversation()
            val stream = conversation.stream(prompt.toIntArray(), Options(50, 3))
            val collected = ArrayList<Int>()
            val reader = scope.async { stream.asFlow().collect { collected.add(it.id) } }
            held.begins()
            runBlocking {
                var joined = false
                val closing = launch {
                    decoder.closeAndJoin()
                    joined = true
                }
                launch { // on the same thread
                    while (!bundle.target.closed && Thread.getAllStackTraces().none(::waitsForTurn)) Thread.yield()
                    assertFalse(bundle.target.closed)
                    closing.cancel() // closes all the same
                    held.go()
                }
                closing.join()
                assertTrue(joined)
            }
            assertTrue(bundle.target.closed && bundle.drafter.closed)
            val error = reader.error()
            assertEquals(listOf<Any>(IllegalStateException::class, CLOSED), listOf(error::class, error.message))
            assertEquals(pass + 1, bundle.target.passes)
            val text = prompt.toMutableList()
            for (id in collected) text.add(id.also { assertEquals(chosenAfter(text), it) })
            val late = listOf<suspend () -> Any>(
                { decoder.onDecoder { conversation.save(File(directory, "session")) } },
                { decoder.onDecoder { decoder.openSession(File(directory, "session")) } },
            )
            for (use in late) assertEquals(CLOSED, assertFailsWith<IllegalStateException> { runBlocking { use() } }.message)
            runBlocking { decoder.closeAndJoin() }
        }
    }

    @Test
    fun errorsOfAPassAreThoseOfTheCollection() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val conversation = bundle.decoder().conversation()
        for (pass in listOf(3, CHUNKS + 3)) {
            for (expected in listOf(InputError("cannot run"), OutOfMemoryError("none"), IllegalStateException("broken"))) {
                conversation.forget()
                var left = pass
                bundle.target.inPass = { if (left-- == 0) throw expected }
                val stream = conversation.stream(prompt.toIntArray(), Options(50, 3))
                val error = scope.async { ids(stream) }.error()
                assertEquals(listOf<Any?>(expected::class, expected.message), listOf(error::class, error.message))
                checkGoesOn(conversation, prompt + stream.tokens, minOf(16 * pass, prompt.size))
            }
        }
    }

    private val golden = File(repository, "tests/golden/format3/onnx")

    @Test
    fun aBundleIsLoadedOnAThreadOfItsDecoder() {
        var loader = Thread.currentThread()
        val target = FakeGraph(true, false)
        val caller = Thread.currentThread()
        val callers = HashSet<Thread>()
        runBlocking {
            val load = LoadGraphs { _, _, _ -> mapOf("target" to target).also { loader = Thread.currentThread() } }
            val decoder = loadDecoder(golden, load) { _, _ -> callers.add(Thread.currentThread()) }
            assertEquals(setOf(loader), callers)
            assertFalse(loader == caller)
            assertEquals("gemma-mtp-decoder" to 7, loader.name to loader.priority)
            decoder.closeAndJoin()
        }
        assertTrue(target.closed)
        loader.join() // it has ended
    }

    @Test
    fun anOpeningThatIsCancelledLeavesNothingOpen() {
        for (inFiles in listOf(true, false)) {
            val graphs = ArrayList<FakeGraph>()
            val files = ArrayList<String>()
            lateinit var opening: Deferred<Decoder>
            val known = CompletableDeferred<Unit>()
            lateinit var thread: Thread
            opening = scope.async {
                known.await()
                val load = LoadGraphs { _, _, _ ->
                    opening.cancel()
                    mapOf("target" to FakeGraph(true, false).also(graphs::add))
                }
                loadDecoder(golden, load) { name, _ ->
                    thread = Thread.currentThread()
                    files.add(name)
                    if (inFiles) opening.cancel()
                }
            }
            known.complete(Unit)
            assertTrue(opening.error() is CancellationException)
            runBlocking { opening.join() }
            val expected = if (inFiles) 1 to 0 else readManifest(golden).files.size to 1
            assertEquals(expected, files.toSet().size to graphs.size)
            assertTrue(graphs.all { it.closed })
            thread.join() // it has ended
        }
    }

    @Test
    fun whatCannotBeOpenedIsTheSameError() = inTemporaryDirectory { directory ->
        val none = LoadGraphs { _, _, _ -> emptyMap() }
        val expected = assertFailsWith<InputError> { openDecoder(directory, none) }
        assertEquals(expected.message, assertFailsWith<InputError> { runBlocking { loadDecoder(directory, none) } }.message)
    }

    @Test
    fun aTextThatIsLeftKeepsItsCosts() = inTemporaryDirectory { directory ->
        var saves = 0
        val decoder = FakeBundle(directory).decoder { saves++ }
        runBlocking { decoder.stream(intArrayOf(3, 4), Options(50, 0)).asFlow().take(2).toList() }
        assertEquals(1, saves)
    }
}
