package gemmamtp.core

import java.io.File
import java.util.Random
import java.util.concurrent.CountDownLatch
import java.util.concurrent.atomic.AtomicInteger
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Job
import kotlinx.coroutines.runBlocking

private const val CONTEXT = 600
private const val LONGEST = CONTEXT - 50 // of the texts that go on

/** What happens while texts are written. */
private enum class Disturbance { NOTHING, CANCEL, CANCEL_COLLECTOR, CLOSE, INTERRUPT, SAVE, ALLOCATE, BIND, RUN }

/** The moment when so many events are over. */
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

private class Stress(private val directory: File, seed: Long) {
    private val random = Random(seed)
    private val undisturbed = FakeBundle(directory, maxSeqLen = CONTEXT).decoder()
    private val passes = Moment()
    private val binds = Moment()
    private val allocations = Moment()
    private val session = File(directory, "session")
    private var saved = emptyList<Int>()
    private val talks = ArrayList<Talk>()
    private lateinit var bundle: FakeBundle
    private lateinit var decoder: Decoder

    /** How often each disturbance came before the texts had ended. */
    val struck = IntArray(Disturbance.values().size)

    init {
        open()
    }

    private fun open() {
        bundle = FakeBundle(directory, maxSeqLen = CONTEXT, allocate = { direct(it).also { allocations.event() } })
        for (graph in listOf(bundle.target, bundle.drafter)) {
            graph.inPass = passes::event
            graph.inBind = binds::event
        }
        decoder = bundle.decoder()
        talks.clear()
        if (session.exists()) talks.add(Talk(decoder.openSession(session), saved))
    }

    fun step() {
        val disturbance = Disturbance.values()[random.nextInt(Disturbance.values().size)]
        while (talks.size < 2) talks.add(Talk(decoder.conversation()))
        talks.shuffle(random)
        if (talks.size > 4 || random.nextInt(4) == 0) talks[0] = Talk(decoder.conversation())
        val writers = talks.take(1 + random.nextInt(2)).map(::writer)
        val (expectedError, disturber) = disturb(disturbance, writers.random())
        val errors = writers.map { Other("writer") { it.write() } }.map { it.result() }
        listOf(passes, binds, allocations).forEach { it.never() }
        bundle.target.left = 0
        val isStruck = disturber() || errors.any { it != null }
        if (isStruck) struck[disturbance.ordinal]++
        for ((writer, error) in writers.zip(errors)) check(writer, error, expectedError, disturbance)
        if (disturbance == Disturbance.CLOSE && isStruck) {
            checkClosed()
            open()
        }
        talks.forEach(::checkGoesOn)
        if (random.nextInt(10) == 0) save(talks[0].conversation)
    }

    private fun <T> List<T>.random() = get(random.nextInt(size))

    private fun writer(talk: Talk): Writer {
        if (talk.text.size > LONGEST) talk.text = emptyList()
        val kept = talk.text.size - if (random.nextInt(4) == 0) random.nextInt(talk.text.size + 1) else 0
        val new = List(1 + random.nextInt(if (random.nextBoolean()) 10 else 120)) { random.nextInt(FAKE_VOCAB) }
        val sampling = Sampling(random.nextInt(2).toDouble(), seed = random.nextLong())
        val drafts = random.nextInt(7).let { if (it < 6) it else null }
        val options = Options(1 + random.nextInt(40), drafts, sampling, whenFull = WhenFull.values()[random.nextInt(2)])
        val prompt = (talk.text.take(kept) + new).take(CONTEXT - 1 - random.nextInt(20))
        return Writer(talk, prompt, options, random.nextBoolean())
    }

    /** Let something happen at a random moment. Gives the error of texts that it ends, and whether it happened. */
    private fun disturb(disturbance: Disturbance, writer: Writer): Pair<Throwable?, () -> Boolean> {
        val after = random.nextInt(if (random.nextBoolean()) 3 else 20)
        fun thrown(moment: Moment, after: Int, error: Throwable): Pair<Throwable, () -> Boolean> {
            moment.set(after) { throw error }
            return error to { false }
        }
        return when (disturbance) {
            Disturbance.NOTHING -> null to { false }
            Disturbance.ALLOCATE -> thrown(allocations, random.nextInt(2), OutOfMemoryError("no memory"))
            Disturbance.BIND -> thrown(binds, random.nextInt(4), InputError("cannot use the KV cache"))
            Disturbance.RUN -> when (random.nextInt(3)) {
                0 -> InputError("the graph cannot run") to { false }.also { bundle.target.left = after + 1 }
                1 -> thrown(passes, after, IllegalArgumentException("not known to the runtime"))
                else -> thrown(passes, after, InputError("cannot run"))
            }
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
        undisturbed.forget()
        val expected = undisturbed.stream(writer.prompt.toIntArray(), writer.options.copy(numDraftTokens = 0))
        expected.forEach { _ -> }
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

    /** Its next text is right. */
    private fun checkGoesOn(talk: Talk) {
        if (talk.text.size > LONGEST) talk.text = emptyList()
        val text = (talk.text + random.nextInt(FAKE_VOCAB)).toMutableList()
        val stream = talk.conversation.stream(text.toIntArray(), Options(1 + random.nextInt(6), random.nextInt(6)))
        for (token in stream) text.add(token.id.also { assertEquals(chosenAfter(text), it) })
        assertEquals("length", stream.stats.finishReason)
        talk.text = text
    }

    /** Save a conversation that may be in the middle of a text, and go on with what was saved as another one. */
    private fun save(conversation: Conversation) {
        conversation.save(session)
        val opened = decoder.openSession(session)
        saved = opened.cache.tokens.toList()
        talks.add(Talk(opened, saved))
    }

    private fun checkClosed() {
        assertTrue(bundle.target.closed && bundle.drafter.closed)
        assertEquals(0, bundle.running.get())
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

/** Texts in several conversations with a disturbance at a random moment: no token is wrong, and all of them go on. */
class StressTest {
    /** More of it: `java -Dstress=10000 -Dseed=7 ... org.junit.runner.JUnitCore gemmamtp.core.StressTest`. */
    @Test
    fun nothingIsLostWhateverHappensInATurn() = inTemporaryDirectory { directory ->
        val steps = System.getProperty("stress")?.toInt() ?: 200
        val seed = System.getProperty("seed")?.toLong() ?: 0
        val stress = Stress(directory, seed)
        for (step in 1..steps) {
            try {
                stress.step()
            } catch (error: Throwable) {
                throw AssertionError("step $step of seed $seed: $error", error)
            }
        }
        val struck = Disturbance.values().drop(1).associateWith { stress.struck[it.ordinal] }
        assertTrue(struck.values.all { it > steps / 50 }, "$struck")
    }
}
