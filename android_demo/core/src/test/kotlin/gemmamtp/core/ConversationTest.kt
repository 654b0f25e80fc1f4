package gemmamtp.core

import java.io.File
import java.util.Random
import java.util.concurrent.Callable
import java.util.concurrent.CountDownLatch
import java.util.concurrent.ExecutionException
import java.util.concurrent.FutureTask
import kotlin.concurrent.thread
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue

/** Work of another thread. */
internal class Other<T>(name: String, work: () -> T) {
    private val task = FutureTask(Callable { work() })
    private val thread = thread(isDaemon = true, name = name) { task.run() }

    /** Wait until it waits for somebody. */
    fun waits() {
        while (thread.state != Thread.State.WAITING) {
            check(thread.state != Thread.State.TERMINATED) { "it has ended" }
            Thread.yield()
        }
    }

    fun result(): T = task.get()

    fun error(): Throwable = assertFailsWith<ExecutionException> { task.get() }.cause!!
}

/** Holds a graph's next pass, or one after more passes, until it may go on. */
internal class Held(graph: FakeGraph, private var before: Int = 0) {
    private val began = CountDownLatch(1)
    private val mayEnd = CountDownLatch(1)

    init {
        graph.inPass = {
            if (before-- <= 0) {
                began.countDown()
                mayEnd.await()
            }
        }
    }

    fun begins() = began.await()

    fun go() = mayEnd.countDown()
}

/** Conversations of one decoder: in any order and on any threads each writes what it writes alone. */
class ConversationTest {
    /** Three texts of a conversation, each after those before it: every token, and the drafts of its round. */
    private fun talk(seed: Int, stream: (IntArray, Options) -> Stream): Sequence<Pair<Int, List<Int>>> = sequence {
        val random = Random(seed.toLong())
        var text = emptyList<Int>()
        repeat(3) {
            text = text + List(1 + random.nextInt(120)) { random.nextInt(FAKE_VOCAB) }
            val sampling = Sampling(temperature = random.nextInt(2).toDouble(), seed = 7)
            val written = stream(text.toIntArray(), Options(1 + random.nextInt(60), random.nextInt(6), sampling))
            for (token in written) {
                text = text + token.id
                yield(token.id to written.lastRound!!.drafts)
            }
        }
    }

    /** The first of the streams is the decoder's own, the others are those of new conversations. */
    private fun streams(decoder: Decoder): List<(IntArray, Options) -> Stream> {
        val others = List(3) { decoder.conversation() }
        return listOf<(IntArray, Options) -> Stream>({ prompt, options -> decoder.stream(prompt, options) }) +
            others.map { { prompt, options -> it.stream(prompt, options) } }
    }

    private fun alone(directory: File) = List(4) { seed ->
        val decoder = FakeBundle(directory).decoder()
        talk(seed, { prompt, options -> decoder.stream(prompt, options) }).toList()
    }

    @Test
    fun inTurnTokenByToken() = inTemporaryDirectory { directory ->
        val alone = alone(directory)
        for (order in 0L..4L) {
            val random = Random(order)
            val talks = streams(FakeBundle(directory).decoder()).mapIndexed { i, stream -> talk(i, stream).iterator() }
            val written = talks.map { ArrayList<Pair<Int, List<Int>>>() }
            while (true) {
                val open = talks.indices.filter { written[it].size < alone[it].size }
                val next = if (open.isEmpty()) break else open[random.nextInt(open.size)]
                written[next].add(talks[next].next())
            }
            assertEquals(alone, written.map { it.toList() })
            assertTrue(talks.none { it.hasNext() })
        }
    }

    @Test
    fun onThreadsOfTheirOwn() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        var saves = 0
        val decoder = bundle.decoder {
            assertEquals(0, bundle.running.get())
            saves = saves.let { it.also { Thread.yield() } + 1 }
        }
        val written = streams(decoder).mapIndexed { i, stream -> Other("$i") { talk(i, stream).toList() } }.map { it.result() }
        assertEquals(alone(directory), written)
        assertEquals(12, saves)
    }

    @Test
    fun closingWaitsForTheRoundThatRuns() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val conversation = decoder.conversation()
        val file = File(directory, "session")
        val stream = conversation.stream(intArrayOf(3, 4), Options(50, 0))
        stream.next()
        val held = Held(bundle.target)
        val writer = Other("writer") { stream.next() }
        held.begins()
        val closer = Other("closer") { decoder.close() }
        closer.waits()
        stream.cancel() // waits for nothing
        assertFalse(bundle.target.closed)
        held.go()
        assertEquals(chosenAfter(listOf(3, 4, stream.tokens[0])), writer.result().id)
        closer.result()
        assertTrue(bundle.target.closed && bundle.drafter.closed)
        decoder.close()
        val prompt = intArrayOf(3)
        val uses: List<() -> Any> = listOf(
            { stream.next() },
            { conversation.stream(prompt, Options()) },
            { decoder.stream(prompt, Options()) },
            { decoder.conversation() },
            { conversation.save(file) },
            { decoder.openSession(file) },
        )
        for (use in uses) {
            val error = assertFailsWith<IllegalStateException> { use() }
            assertEquals("the decoder was closed; open the bundle again", error.message)
        }
    }

    @Test
    fun closingEndsAPromptAfterTheChunkThatRuns() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val held = Held(bundle.target)
        val writer = Other("writer") { decoder.stream(IntArray(160) { it % FAKE_VOCAB }, Options()).hasNext() }
        held.begins()
        val closer = Other("closer") { decoder.close() }
        closer.waits()
        held.go()
        closer.result()
        assertTrue("closed" in (writer.error() as IllegalStateException).message!!)
        assertEquals(1, bundle.target.passes)
    }

    @Test
    fun aLongPromptGivesWayBetweenItsChunks() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val stream = decoder.conversation().stream(intArrayOf(3, 4), Options(50, 0))
        stream.next()
        val order = ArrayList<String>()
        val held = Held(bundle.target)
        val hold = bundle.target.inPass
        bundle.target.inPass = { order.add(Thread.currentThread().name).also { hold() } }
        val prompt = List(160) { it * 7 % FAKE_VOCAB }
        val reader = Other("reader") { decoder.stream(prompt.toIntArray(), Options()).next() }
        held.begins()
        val writer = Other("writer") { stream.next() }
        writer.waits()
        held.go()
        assertEquals(chosenAfter(listOf(3, 4, stream.tokens[0])), writer.result().id)
        assertEquals(chosenAfter(prompt), reader.result().id)
        assertEquals(listOf("reader", "writer") + List(9) { "reader" }, order)
    }

    @Test
    fun aTextEndsAPromptOfTheSameConversation() = inTemporaryDirectory { directory ->
        val bundle = FakeBundle(directory)
        val decoder = bundle.decoder()
        val held = Held(bundle.target)
        val reader = Other("reader") { decoder.stream(IntArray(160) { 5 }, Options()).next() }
        held.begins()
        val prompt = List(100) { if (it < 16) 5 else it % FAKE_VOCAB }
        val writer = Other("writer") { decoder.stream(prompt.toIntArray(), Options(40, 3)).asSequence().map { it.id }.toList() }
        writer.waits()
        held.go()
        assertTrue("another text" in (reader.error() as IllegalStateException).message!!)
        val text = prompt.toMutableList()
        for (token in writer.result()) text.add(token.also { assertEquals(chosenAfter(text), it) })
        assertEquals(140, text.size)
    }

    @Test
    fun nothingElseRunsWithinAPass() = inTemporaryDirectory { directory ->
        val decoder = FakeBundle(directory).decoder()
        val conversation = decoder.conversation()
        val other = decoder.conversation().stream(intArrayOf(3), Options())
        val uses: List<() -> Any> = listOf({ other.next() }, { conversation.save(File(directory, "session")) }, { decoder.close() })
        for (use in uses) {
            val stream = conversation.stream(intArrayOf(3, 4), Options()) { _, _ -> use() }
            assertTrue("within a pass" in assertFailsWith<IllegalStateException> { stream.next() }.message!!)
        }
        assertEquals(chosenAfter(listOf(3)), other.next().id)
    }

    @Test
    fun whatAConversationTakes() = inTemporaryDirectory { directory ->
        val decoder = FakeBundle(directory).decoder()
        val (one, other) = List(2) { decoder.conversation() }
        assertEquals(listOf(0L, 900L), listOf(one.numBytes, one.tokensLeft.toLong()))
        one.stream(IntArray(300) { 3 }, Options(1)).next()
        assertEquals(600, one.tokensLeft)
        assertEquals((2 * 4 * (512 + 256)).toLong(), one.numBytes)
        assertEquals(listOf(0L, 900L), listOf(other.numBytes, other.tokensLeft.toLong()))
    }
}
