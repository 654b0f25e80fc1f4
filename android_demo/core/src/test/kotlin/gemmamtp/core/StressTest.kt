package gemmamtp.core

import java.io.File
import java.nio.ByteBuffer
import java.util.Random
import kotlin.concurrent.thread
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Texts, and after each what happens in one of them; more of both with -Dstress=10000 -Dseed=7. */
private val STEPS = Integer.getInteger("stress", 200)
private val SEED = java.lang.Long.getLong("seed", 1L)

private const val MAX_TEXT = 800

/** What happens in the middle of a text. */
private enum class Trouble { NONE, CANCEL, CLOSE, MEMORY, BIND, SPOILT, RUNTIME, INTERRUPT }

/** A decoder on fake graphs, and its conversations with their texts. */
private class Phone(val directory: File, digest: String = "phone") {
    var allocations = Int.MAX_VALUE // until one fails
    var passes = Int.MAX_VALUE // until something happens in one
    var binds = Int.MAX_VALUE
    var trouble: () -> Unit = {}
    val bundle = FakeBundle(directory, digest = digest, allocate = ::allocate)
    val decoder = Decoder(bundle.engine, null, null, DraftLength(5, Costs(5, 2)), allocate = ::allocate)
    val talks = ArrayList<Pair<Conversation, List<Int>>>()

    init {
        for (graph in listOf(bundle.target, bundle.drafter)) {
            graph.inPass = { if (--passes == 0) trouble() }
            graph.inBind = { if (--binds == 0) throw InputError("the buffers cannot be used") }
        }
    }

    private fun allocate(bytes: Long): ByteBuffer {
        if (--allocations == 0) throw OutOfMemoryError("no memory")
        return direct(bytes)
    }

    fun calm() {
        allocations = Int.MAX_VALUE
        passes = Int.MAX_VALUE
        binds = Int.MAX_VALUE
        bundle.target.left = 0
        Thread.interrupted()
    }
}

/** Whatever happens at any moment, what was given out is right, and so is all that comes after it. */
class StressTest {
    private val random = Random(SEED)

    /** What a text is where nothing happens. */
    private fun undisturbed(directory: File, prompt: IntArray, options: Options) =
        FakeBundle(directory).decoder().stream(prompt, options).asSequence().map { it.id }.toList()

    private fun options() = Options(
        1 + random.nextInt(40), listOf(0, 2, 5, null)[random.nextInt(4)],
        Sampling(temperature = random.nextInt(2).toDouble(), seed = random.nextLong()),
    )

    @Test
    fun nothingIsLostWhateverHappensAtAnyMoment() = inTemporaryDirectory { directory ->
        val seen = HashMap<String, Int>()
        var phone = Phone(directory)
        for (step in 1..STEPS) {
            val at = if (phone.talks.size < 3) phone.talks.size else random.nextInt(3)
            if (at == phone.talks.size) phone.talks.add(begin(phone, directory))
            val (conversation, before) = phone.talks[at]
            val goesOn = random.nextInt(4) > 0 && before.size < MAX_TEXT
            val new = List(1 + random.nextInt(100)) { random.nextInt(FAKE_VOCAB) }
            val prompt = ((if (goesOn) before else emptyList()) + new).toIntArray()
            val options = options()
            val trouble = Trouble.values()[random.nextInt(Trouble.values().size)]
            val expected = undisturbed(directory, prompt, options)
            val label = "seed $SEED, step $step, $trouble"
            val text = conversation.stream(prompt, options)
            val closing = begin(phone, trouble, text)
            val given = ArrayList<Int>()
            val error = try {
                for (token in text) given.add(token.id)
                null
            } catch (error: Throwable) {
                error
            }
            closing.forEach(Thread::join)
            phone.calm()
            val outcome = outcome(label, trouble, error, text, given, expected)
            seen["$trouble $outcome"] = (seen["$trouble $outcome"] ?: 0) + 1
            assertEquals(0, phone.bundle.running.get(), label)
            phone.talks[at] = conversation to prompt.toList() + given
            if (phone.bundle.target.closed) {
                assertFailsWith<IllegalStateException>(label) { conversation.stream(prompt, options) }
                phone = Phone(directory)
            } else if (random.nextInt(5) == 0) {
                save(label, conversation, File(directory, "session"))
            }
        }
        assertTrue(Trouble.values().all { trouble -> seen.keys.any { it.startsWith("$trouble ") } }, "$seen")
        assertTrue(seen.keys.count { "whole" !in it } >= 6, "$seen")
    }

    /** A conversation, sometimes one of a saved session. */
    private fun begin(phone: Phone, directory: File): Pair<Conversation, List<Int>> {
        val file = File(directory, "session")
        if (!file.exists() || random.nextBoolean()) return phone.decoder.conversation() to emptyList()
        val opened = phone.decoder.openSession(file)
        return opened to opened.cache.tokens.toList()
    }

    /** Let something happen at a random moment; returns threads to wait for. */
    private fun begin(phone: Phone, trouble: Trouble, text: Stream): List<Thread> {
        val started = ArrayList<Thread>()
        val moment = 1 + random.nextInt(12)
        if (trouble == Trouble.MEMORY) phone.allocations = 1 + random.nextInt(3)
        else if (trouble == Trouble.BIND) phone.binds = 1 + random.nextInt(4)
        else if (trouble == Trouble.SPOILT) phone.bundle.target.left = moment
        else phone.passes = moment
        phone.trouble = {
            when (trouble) {
                Trouble.CANCEL -> thread { text.cancel() }.join()
                Trouble.CLOSE -> started.add(thread { phone.decoder.close() })
                Trouble.RUNTIME -> throw IllegalArgumentException("the runtime is at fault")
                Trouble.INTERRUPT -> Thread.currentThread().interrupt()
                else -> Unit
            }
        }
        return started
    }

    /** Check what came of a text; returns it in a word. */
    private fun outcome(
        label: String,
        trouble: Trouble,
        error: Throwable?,
        text: Stream,
        given: List<Int>,
        expected: List<Int>,
    ): String {
        assertEquals(expected.take(given.size), given, label)
        assertEquals(given, text.tokens, label)
        val message = error?.message.orEmpty()
        when (error) {
            null -> if (given.size < expected.size) assertEquals("CANCEL cancelled", "$trouble ${text.stats.finishReason}", label)
            is OutOfMemoryError -> assertEquals(Trouble.MEMORY, trouble, label)
            is InputError -> assertTrue(trouble == Trouble.BIND || trouble == Trouble.SPOILT, "$label: $message")
            is IllegalArgumentException -> assertEquals(Trouble.RUNTIME, trouble, "$label: $message")
            is IllegalStateException -> assertTrue(trouble == Trouble.CLOSE && "was closed" in message, "$label: $message")
            else -> throw AssertionError(label, error)
        }
        return if (given.size == expected.size) "whole" else error?.javaClass?.simpleName ?: "cancelled"
    }

    /** Save a conversation, sometimes interrupted: then the file is as it was, or whole. */
    private fun save(label: String, conversation: Conversation, file: File) {
        val before = if (file.exists()) file.readBytes() else null
        val interrupted = random.nextInt(3) == 0
        if (interrupted) Thread.currentThread().interrupt()
        try {
            conversation.save(file)
        } catch (error: InputError) {
            assertTrue(interrupted, "$label: ${error.message}")
            assertEquals(before?.size, if (file.exists()) file.readBytes().size else null, label)
        } finally {
            Thread.interrupted()
        }
    }
}
