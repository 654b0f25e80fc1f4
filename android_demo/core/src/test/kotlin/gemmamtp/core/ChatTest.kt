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
    fun `conversations become the prompts of jinja2`() {
        val (forms, rows) = vectors("conversation.json").let { it.rows("conversation_forms") to it.rows("conversations") }
        for (row in rows) {
            val form = conversationForm(forms[row["form"].asInt])
            val template = ChatTemplate(null, listOf(form))
            val messages = row.rows("messages").map { message ->
                val calls = if (message.has("calls")) message.texts("calls") else emptyList()
                val (thought, name) = listOf("reasoning_content", "name").map { message.get(it)?.asString.orEmpty() }
                val written = calls.map { ToolCall("", "", "{}", it) }
                Message(message.string("role"), message.string("content"), written, thought, name)
            }
            val expected = row["prompt"].takeIf { !it.isJsonNull }?.asString
            for (thinking in form.thinking) {
                val actual = try {
                    template.render(messages, form.tools, thinking)
                } catch (error: InputError) {
                    assertContains(error.message!!, "the chat template refuses the messages: ")
                    null
                }
                assertEquals(expected, actual, row.toString())
            }
        }
        assertEquals(setOf(true, false), rows.map { it["prompt"].isJsonNull }.toSet())
    }

    @Test
    fun `prompts that the bundle has no form of are refused`() {
        val messages = listOf(Message("user", "x"))
        val format = chatFormat(formats[0])
        val form = conversationForm(vectors("conversation.json").rows("conversation_forms")[1]) // thinking, without tools
        val template = ChatTemplate(format, listOf(form))
        assertEquals(ChatTemplate(format).render(messages), template.render(messages))
        assertContains(template.render(messages, thinking = true), "<|think|>")
        for ((reason, render) in listOf<Pair<String, () -> String>>(
            "with tools" to { template.render(messages, tools = true) },
            "with tools" to { template.render(messages, tools = true, thinking = true) },
            "a system message cannot come after a user's message" to {
                template.render(messages + Message("system", "x"), thinking = true)
            },
            "it knows no role" to { template.render(listOf(Message("answer", "x")), thinking = true) },
            "calls without an answer: 1" to {
                template.render(messages + Message("assistant", "", listOf(ToolCall("", "", "{}", "x"))), thinking = true)
            },
            "with thinking" to { template.render(messages, thinking = false) },
            "of chats" to { ChatTemplate(null, listOf(form)).render(messages) },
            "it knows no calls" to { template.render(messages + Message("assistant", "", listOf(ToolCall("", "", "{}", "x")))) },
            "no place for content beside calls" to {
                val silent = ConversationForm(false, setOf(null), form.between, form.trim, null, form.thoughts, true, "", true)
                val answer = Message("assistant", "x", listOf(ToolCall("", "", "{}", "x")))
                ChatTemplate(null, listOf(silent)).render(messages + answer)
            },
        )) assertContains(assertFailsWith<InputError>(reason) { render() }.message!!, reason)
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
