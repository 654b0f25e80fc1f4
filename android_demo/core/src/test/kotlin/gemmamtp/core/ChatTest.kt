package gemmamtp.core

import com.google.gson.JsonArray
import com.google.gson.JsonNull
import com.google.gson.JsonObject
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class ChatTest {
    private val cases = vectors("tokenizer.json")
    private val formats = cases.rows("formats")

    @Test
    fun `chats become the prompts of jinja2`() {
        val rows = cases.rows("chats")
        assertTrue(rows.size > 100)
        for (row in rows) {
            val messages = row.rows("messages").map { Message(it.string("role"), it.string("content")) }
            val template = ChatTemplate(chatFormat(formats[row["format"].asInt]))
            assertEquals(row.string("prompt"), template.render(messages), row.toString())
        }
    }

    @Test
    fun `chats without a place in the format are refused`() {
        val (user, model, system) = listOf("user", "assistant", "system").map { Message(it, "x") }
        val (turns, _, verbatim) = formats.map { ChatTemplate(chatFormat(it)) }
        val order = "user and assistant must take turns"
        for ((reason, template, messages) in listOf(
            Triple("there are none", turns, emptyList()),
            Triple("it knows no role \"tool\"", turns, listOf(Message("tool", "x"))),
            Triple("it knows no role \"system\"", verbatim, listOf(system, user)),
            Triple("a system message must be the first", turns, listOf(user, system)),
            Triple("a system message must be the first", turns, listOf(system, system, user)),
            Triple(order, turns, listOf(system)),
            Triple(order, turns, listOf(model, user)),
            Triple(order, turns, listOf(user, user)),
            Triple(order, turns, listOf(user, model)),
        )) {
            val error = assertFailsWith<InputError>(reason) { template.render(messages) }.message!!
            assertTrue(error.startsWith("the chat template refuses the messages: $reason"), error)
            assertTrue(error.endsWith("; change them"), error)
        }
        verbatim.render(listOf(model, user, user, model))
    }

    @Test
    fun `malformed formats are refused`() {
        for ((message, change) in listOf<Pair<String, (JsonObject) -> Unit>>(
            "chat.begin is missing" to { it.remove("begin") },
            "chat.turns has no user" to { it.getAsJsonObject("turns").remove("user") },
            "chat: user has 0 parts" to { it.getAsJsonObject("turns").add("user", JsonArray()) },
            "chat.hidden is missing" to { it.remove("hidden") },
        )) {
            val error = assertFailsWith<IllegalArgumentException>(message) {
                chatFormat(formats[0].deepCopy().also(change))
            }
            assertContains(error.message!!, message)
        }
        assertEquals(null, chatFormat(formats[1].deepCopy().also { it.add("hidden", JsonNull.INSTANCE) }).hidden)
    }
}
