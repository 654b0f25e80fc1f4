package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.util.Random
import java.util.concurrent.CountDownLatch
import java.util.concurrent.atomic.AtomicInteger
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Job
import kotlinx.coroutines.runBlocking

/** What happens while texts are written. */
internal enum class Disturbance { NOTHING, CANCEL, CANCEL_COLLECTOR, CLOSE, INTERRUPT, SAVE, ALLOCATE, BIND, RUN }

/** Something that happens when so many events are over. */
private class Moment {
    private val left = AtomicInteger()
    @Volatile private var strike = {}

    fun set(after: Int, strike: () -> Unit) {
        this.strike = strike
        left.set(after + 1)
    }

    fun never() = left.set(0)

    fun event() {
        if (left.decrementAndGet() == 0) strike()
    }
}

/** A conversation, and what was said in it. */
private class Talk(val conversation: Conversation, var text: List<Int> = emptyList())

/** A text that is written on a thread of its own. */
private class Writer(val talk: Talk, val prompt: List<Int>, val options: Options, val collects: Boolean) {
    val stream = talk.conversation.stream(prompt.toIntArray(), options)
    val given = ArrayList<Int>()
    val job = Job()

    fun write(): Throwable? = try {
        if (collects) runBlocking(job) { stream.asFlow().collect { given.add(it.id) } }
        else for (token in stream) given.add(token.id)
        null
    } catch (error: Throwable) {
        error
    }
}

/**
 * Writes texts in several conversations, each with a disturbance at a random moment, and compares them with those of a
 * decoder that nothing disturbs: no token is wrong, and every conversation goes on. Whoever is
 * first where threads race, this holds.
 *
 * @param longest tokens of the longest texts.
 * @param session a file for sessions, which does not exist.
 * @param load opens a bundle with graphs as the function gives them.
 */
internal class Stress(
    private val seed: Long,
    private val longest: Int,
    private val session: File,
    private val load: ((Map<String, BoundGraph>) -> Map<String, BoundGraph>, Device) -> Decoder,
) : Closeable {
    private val random = Random(seed)
    private val undisturbed = load({ it }, AnyDevice)
    private val passes = Moment()
    private val binds = Moment()
    private val allocations = Moment()
    private val running = AtomicInteger()
    private val graphs = ArrayList<Watched>()
    private var saved = emptyList<Int>()
    private val talks = ArrayList<Talk>()
    private var decoder = open()

    private val struck = IntArray(Disturbance.values().size)

    /** A graph whose passes are events, as they begin and as they end; one runs at a time, and none once it is closed. */
    private inner class Watched(private val graph: BoundGraph) : BoundGraph by graph {
        @Volatile var closed = false

        override fun bind(cache: Map<String, Tensor>) {
            assertFalse(closed)
            binds.event()
            graph.bind(cache)
        }

        override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
            assertEquals(1, running.incrementAndGet())
            try {
                passes.event()
                return graph.run(inputs).also { passes.event() }
            } finally {
                assertFalse(closed)
                running.decrementAndGet()
            }
        }

        override fun close() {
            assertFalse(closed)
            closed = true
            assertEquals(0, running.get())
            graph.close()
        }
    }

    private fun open(): Decoder {
        graphs.clear()
        talks.clear()
        val device = object : Device {
            override fun allocate(bytes: Long) = direct(bytes).also { allocations.event() }
        }
        val decoder = load({ it.mapValues { (_, graph) -> Watched(graph).also(graphs::add) } }, device)
        if (session.exists()) talks.add(Talk(decoder.openSession(session), saved))
        return decoder
    }

    override fun close() {
        decoder.close()
        undisturbed.close()
    }

    /** Write so often a text or two with one disturbance; gives how often each came before the texts had ended. */
    fun run(steps: Int): Map<Disturbance, Int> {
        for (step in 1..steps) {
            try {
                step()
            } catch (error: Throwable) {
                throw AssertionError("step $step of seed $seed: $error", error)
            }
        }
        return Disturbance.values().drop(1).associateWith { struck[it.ordinal] }
    }

    private fun step() {
        val disturbance = Disturbance.values()[random.nextInt(Disturbance.values().size)]
        while (talks.size < 2) talks.add(Talk(decoder.conversation()))
        talks.shuffle(random)
        if (talks.size > 4 || random.nextInt(4) == 0) talks[0] = Talk(decoder.conversation())
        val writers = talks.take(1 + random.nextInt(2)).map(::writer)
        val (expectedError, disturber) = disturb(disturbance, writers.random())
        val errors = writers.map { Other("writer") { it.write() } }.map { it.result() }
        listOf(passes, binds, allocations).forEach { it.never() }
        val isStruck = disturber() || errors.any { it != null }
        if (isStruck) struck[disturbance.ordinal]++
        for ((writer, error) in writers.zip(errors)) check(writer, error, expectedError, disturbance)
        if (disturbance == Disturbance.CLOSE && isStruck) {
            checkClosed()
            decoder = open()
        }
        writers.map { it.talk }.filter { it in talks }.forEach(::checkGoesOn)
        if (talks.isNotEmpty() && random.nextInt(10) == 0) save(talks[0].conversation)
    }

    private fun <T> List<T>.random() = get(random.nextInt(size))

    private fun writer(talk: Talk): Writer {
        if (talk.text.size > longest) talk.text = emptyList()
        val kept = talk.text.size - if (random.nextInt(4) == 0) random.nextInt(talk.text.size + 1) else 0
        val new = List(1 + random.nextInt(if (random.nextBoolean()) 10 else longest / 5)) { randomToken() }
        val sampling = Sampling(random.nextInt(2).toDouble(), seed = random.nextLong())
        val drafts = if (random.nextInt(6) == 0) null else randomDrafts()
        val options = Options(1 + random.nextInt(20), drafts, sampling, whenFull = WhenFull.values()[random.nextInt(2)])
        val prompt = (talk.text.take(kept) + new).take(longest)
        return Writer(talk, prompt, options, random.nextBoolean())
    }

    /** Let something happen at a random moment. Gives the error of texts that it ends, and whether it happened. */
    private fun disturb(disturbance: Disturbance, writer: Writer): Pair<Throwable?, () -> Boolean> {
        val after = random.nextInt(if (random.nextBoolean()) 3 else 20)
        fun thrown(moment: Moment, after: Int, error: Throwable) =
            error to { false }.also { moment.set(after) { throw error } }
        return when (disturbance) {
            Disturbance.NOTHING -> null to { false }
            Disturbance.ALLOCATE -> thrown(allocations, random.nextInt(2), OutOfMemoryError("no memory"))
            Disturbance.BIND -> thrown(binds, random.nextInt(4), InputError("cannot use the KV cache"))
            Disturbance.RUN ->
                thrown(passes, after, if (after % 2 == 0) InputError("cannot run") else ArithmeticException("x / 0"))
            Disturbance.CANCEL -> null to fromAnotherThread(after) { writer.stream.cancel() }
            Disturbance.CANCEL_COLLECTOR -> null to fromAnotherThread(after) { writer.job.cancel() }
            Disturbance.CLOSE -> IllegalStateException("the decoder was closed; open the bundle again") to
                fromAnotherThread(after) { if (after % 2 == 0) decoder.close() else runBlocking { decoder.closeAndJoin() } }
            Disturbance.INTERRUPT -> null to fromAnotherThread(after) { it.interrupt() }
            Disturbance.SAVE -> talks.random().conversation.let { null to fromAnotherThread(after) { _ -> save(it) } }
        }
    }

    /** Work of another thread that begins in a pass; it gets the thread of the pass. Gives whether it began. */
    private fun fromAnotherThread(after: Int, work: (Thread) -> Unit): () -> Boolean {
        val began = CountDownLatch(1)
        val yields = random.nextInt(5)
        var thread: Thread? = null
        passes.set(after) {
            thread = Thread.currentThread()
            began.countDown()
            repeat(yields) { Thread.yield() }
        }
        val other = Other("disturber") {
            began.await()
            thread?.let(work)
        }
        return {
            began.countDown()
            other.result()
            thread != null
        }
    }

    private fun check(writer: Writer, error: Throwable?, expectedError: Throwable?, disturbance: Disturbance) {
        val (stream, given) = writer.stream to writer.given
        writer.talk.text = writer.prompt + stream.tokens
        val expected = expected(writer.prompt, writer.options)
        assertEquals(expected.tokens.take(stream.tokens.size), stream.tokens)
        val lost = if (error is CancellationException) 1 else 0 // of the pass that ran
        assertTrue(stream.tokens.size - given.size in 0..lost)
        assertEquals(stream.tokens.take(given.size), given)
        if (error is CancellationException) {
            assertEquals(Disturbance.CANCEL_COLLECTOR, disturbance)
        } else if (error != null) {
            val (found, allowed) = listOf(error, expectedError).map { it?.javaClass to it?.message }
            assertEquals(allowed, found, error.stackTraceToString())
        } else if (stream.stats.finishReason != "cancelled" || disturbance != Disturbance.CANCEL) {
            assertEquals(expected.stats.finishReason to expected.tokens.size, stream.stats.finishReason to given.size)
        }
    }

    private fun expected(prompt: List<Int>, options: Options) =
        undisturbed.stream(prompt.toIntArray(), options.copy(numDraftTokens = 0)).apply { forEach { _ -> } }

    /** Its next text is right. */
    private fun checkGoesOn(talk: Talk) {
        val prompt = if (talk.text.size > longest) listOf(randomToken()) else talk.text + randomToken()
        val options = Options(1 + random.nextInt(6), randomDrafts())
        val stream = talk.conversation.stream(prompt.toIntArray(), options)
        assertEquals(expected(prompt, options).tokens, stream.asSequence().map { it.id }.toList())
        talk.text = prompt + stream.tokens
    }

    private fun randomDrafts() = random.nextInt(decoder.manifest.maxDraftTokens + 1)

    private fun randomToken() = random.nextInt(decoder.manifest.vocabSize)

    /** Save a conversation that may be in the middle of a text, and go on with what was saved as another one. */
    private fun save(conversation: Conversation) {
        conversation.save(session)
        val opened = decoder.openSession(session)
        saved = opened.cache.tokens.toList()
        talks.add(Talk(opened, saved))
    }

    private fun checkClosed() {
        assertTrue(graphs.all { it.closed })
        decoder.close()
        val uses: List<() -> Any> = listOf(
            { decoder.conversation() },
            { decoder.openSession(session) },
            { talks[0].conversation.save(session) },
            { talks[0].conversation.stream(intArrayOf(3), Options()) },
        )
        for (use in uses) assertTrue("was closed" in assertFailsWith<IllegalStateException> { use() }.message!!)
    }
}
