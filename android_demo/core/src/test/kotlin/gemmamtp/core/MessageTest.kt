package gemmamtp.core

import java.io.File
import java.nio.FloatBuffer
import kotlin.test.Test
import kotlin.test.assertEquals

private const val VOCAB = 2048
private const val EOS = 1
private val THOUGHT_MARKS = 2040 to 2041
private val CALL_MARKS = 2042 to 2043

/** An engine that writes given tokens, and remembers what it was asked. */
private class ScriptedEngine(override val manifest: Manifest, private val script: Iterator<Int>) : Engine {
    override var cache = Cache(manifest)
    var prompt = emptyList<Int>()

    override fun prefill(tokens: List<Int>, sampling: Chooser, start: Int, goOn: (Int) -> Boolean): Round {
        prompt = tokens
        return verify(tokens.last(), emptyList(), sampling)
    }

    override fun draft(last: Int, numDraftTokens: Int) = emptyList<Int>()

    override fun verify(last: Int, drafts: List<Int>, sampling: Chooser) = Round(drafts, 0, listOf(script.next()), listOf(0.0))

    override fun score(state: FloatBuffer, token: Int) = throw AssertionError("no rule was asked for")
}

class MessageTest {
    private val channels = mapOf(THOUGHT to THOUGHT_MARKS, TOOL_CALL to CALL_MARKS)
    private val parts = mapOf(TOOL_CALL to PartForm("call:", syntax = "pairs", quote = "'"))
    private val manifest = smallManifest(VOCAB, 200, 4, eos = setOf(EOS), channels = channels, parts = parts)
    private val file = File(repository, vectors("tokenizer.json").rows("files")[0].string("file"))
    private val tokenizer = Tokenizer(file, 2, setOf(EOS), channels, parts)

    private fun ids(text: String) = tokenizer.encode(text).drop(1)

    @Test
    fun `an answer goes into the next prompt with its thought and its calls`() {
        val called = "call:weather{place:'Bern'}"
        val script = listOf(THOUGHT_MARKS.first) + ids("Look.") + THOUGHT_MARKS.second + ids("Wait.") +
            listOf(CALL_MARKS.first) + ids(called) + listOf(CALL_MARKS.second, CALL_MARKS.first) + ids("call:broken") +
            listOf(CALL_MARKS.second, EOS) + ids("So.") + EOS
        val engine = ScriptedEngine(manifest, script.iterator())
        val between = mapOf(
            "begin" to mapOf("user" to "[user]"),
            "user" to mapOf("ask" to "[model]", "thought" to "[model]("),
            "thought" to mapOf("call" to ")<"),
            "call" to mapOf("name" to ">"),
            "name" to mapOf("tool" to "="),
            "tool" to mapOf("beside" to ";"),
            "beside" to mapOf("ask" to "!"),
        )
        val form = ConversationForm(true, setOf(true), between, emptySet(), null, setOf("call"), true, "after", true)
        val decoder = Decoder(engine, tokenizer, ChatTemplate(null, listOf(form)), DraftLength(4, Costs(4)))
        val messages = mutableListOf(Message("user", "Rain?"))
        val options = Options(numDraftTokens = 0)

        val stream = decoder.chat(messages, options, tools = true, thinking = true)
        stream.forEach { _ -> }
        val message = stream.message
        assertEquals(listOf("assistant", "Wait.", "Look."), listOf(message.role, message.content, message.thought))
        assertEquals(listOf(called), message.calls.map { it.text }) // the one that cannot be read is left out
        messages += listOf(message, toolMessage(message.calls[0], "wet"))
        assertEquals("So.", decoder.chat(messages, options, tools = true, thinking = true).apply { forEach { _ -> } }.text)
        assertEquals("[user]Rain?[model](Look.)<$called>weather=wet;Wait.!", tokenizer.decode(engine.prompt))
    }
}
