package gemmamtp.core

import com.google.gson.JsonParser
import kotlin.test.Test
import kotlin.test.assertEquals

class ToolCallsTest {
    private val cases = vectors("conversation.json")
    private val forms = cases.rows("forms").map { form ->
        val (before, after, syntax, quote) =
            listOf("before", "after", "syntax", "quote").map { form.get(it)?.asString.orEmpty() }
        PartForm(before, after, syntax, quote)
    }

    @Test
    fun `calls are read as runtime_ref reads them`() {
        for (row in cases.rows("calls")) {
            val text = row.string("text")
            val call = readCall(text, forms[row["form"].asInt], "7", row["closed"].asBoolean)
            assertEquals(row["name"]?.asString.orEmpty(), call.name, text)
            assertEquals(row.has("name"), call.problem.isEmpty(), "$text: ${call.problem}")
            assertEquals(row["arguments"] ?: JsonParser.parseString("{}"), JsonParser.parseString(call.arguments), text)
            assertEquals("7" to text, call.id to call.text)
        }
    }
}
