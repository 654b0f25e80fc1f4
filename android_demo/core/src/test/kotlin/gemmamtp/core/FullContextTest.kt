package gemmamtp.core

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertNull
import kotlin.test.assertTrue

private const val CONTEXT = 64

/** A full context: the text ends, or its oldest part is left out; drafts change no token, and nothing is lost. */
class FullContextTest {
    private val prompt = listOf(2, 5, 9, 11, 4)

    private fun encoded(messages: List<Message>): List<Int> = listOf(2) + messages.flatMap { message ->
        val (token, count) = message.content.split(" ").map(String::toInt)
        List(count) { token }
    } + 3

    @Test
    fun `what stays of a chat is what the vectors say`() {
        for (case in vectors("full_context.json").rows("chats")) {
            val messages = case.rows("messages").map { Message(it.string("role"), it.string("content")) }
            val context = case["max_seq_len"].asInt
            val shift = ChatShift(messages, context, ::encoded)
            val begun = shift.begin { commonPrefix(case.ints("cache"), it.dropLast(1)) }
            assertEquals(case.ints("prompt"), begun)
            val dropped = arrayListOf(shift.droppedMessages)
            for (step in case.getAsJsonArray("shifts")) {
                val (count, length) = step.asJsonArray.map { it.asInt }
                assertEquals(length, shift.shift(List(count) { 7 })!!.size)
                dropped.add(shift.droppedMessages)
            }
            assertEquals(case.ints("dropped_messages"), dropped)
            if (begun.size < context) assertNull(shift.shift(List(case["last_answer"].asInt) { 7 }))
        }
    }

    @Test
    fun `a template that refuses the rest ends the text`() {
        val messages = listOf("10 20", "11 20", "12 10").zip(listOf("user", "assistant", "user")) { content, role -> Message(role, content) }
        val shift = ChatShift(messages, CONTEXT) { if (it.size < 3) refuse("no") else encoded(it) }
        assertEquals(52, shift.begin { 0 }.size)
        assertNull(shift.shift(List(12) { 1 }))
        assertEquals(0, shift.droppedMessages)
    }

    @Test
    fun `a shifted text is that of plain decoding`() = inTemporaryDirectory { directory ->
        fun written(drafts: Int, whenFull: WhenFull, sampling: Sampling = Sampling()): Stream {
            val decoder = FakeBundle(directory, maxSeqLen = CONTEXT).decoder()
            return decoder.stream(prompt.toIntArray(), Options(200, drafts, sampling, whenFull = whenFull)).also { it.forEach { _ -> } }
        }
        for (sampling in listOf(Sampling(), Sampling(1.0, seed = 7))) {
            val plain = written(0, WhenFull.SHIFT, sampling)
            assertEquals(200, plain.tokens.size)
            assertEquals("length", plain.stats.finishReason)
            assertTrue(plain.stats.droppedTokens > 2 * CONTEXT)
            assertEquals(CONTEXT - prompt.size - 200 + plain.stats.droppedTokens, plain.tokensLeft)
            for (drafts in 1..5) assertEquals(plain.tokens, written(drafts, WhenFull.SHIFT, sampling).tokens)
            val stopped = written(3, WhenFull.STOP, sampling)
            assertEquals(plain.tokens.take(CONTEXT - prompt.size), stopped.tokens)
            assertEquals("max_seq_len" to 0, stopped.stats.finishReason to stopped.tokensLeft)
            // The same as a new text of what stays.
            val half = prompt.take(1) + stopped.tokens.takeLast(CONTEXT / 2 - 1)
            if (sampling.temperature == 0.0) {
                val alone = FakeBundle(directory, maxSeqLen = CONTEXT).decoder().stream(half.toIntArray(), Options(CONTEXT / 2, 0))
                assertEquals(plain.tokens.drop(stopped.tokens.size).take(CONTEXT / 2), alone.asSequence().map { it.id }.toList())
            }
        }
    }

    @Test
    fun `a shift that is cancelled ends with the next token`() = inTemporaryDirectory { directory ->
        for (call in 3..4) {
            val decoder = FakeBundle(directory, maxSeqLen = CONTEXT).decoder()
            val calls = ArrayList<Pair<Int, Int>>()
            lateinit var stream: Stream
            stream = decoder.stream(prompt.toIntArray(), Options(200, 2, whenFull = WhenFull.SHIFT)) { done, total ->
                calls.add(done to total)
                if (calls.size == call) stream.cancel()
            }
            val tokens = stream.asSequence().map { it.id }.toList()
            assertEquals(listOf(0 to 5, 5 to 5, 1 to 32), calls.take(3))
            assertEquals("cancelled", stream.stats.finishReason)
            assertTrue(stream.tokensLeft in 0..2)
            val plain = FakeBundle(directory, maxSeqLen = CONTEXT).decoder().stream(prompt.toIntArray(), Options(tokens.size, 0))
            assertEquals(plain.asSequence().map { it.id }.toList(), tokens)
        }
    }
}
