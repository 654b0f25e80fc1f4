package gemmamtp.demo

import com.google.gson.JsonParser
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

class DeviceFiguresTest {
    @Test
    fun eachPromptIsMeasuredWithTheBundlesDraftsAndThePlanners() {
        val model = FakeModel(length = 100)
        val measured = measure(model, mapOf("a" to "x", "b" to "y")) {}
        assertEquals(listOf("a" to 4, "a" to null, "b" to 4, "b" to null), measured.map { it.prompt to it.drafts })
        assertTrue(measured.all { it.comparison.ratio == 2.0 && it.comparison.equal && it.acceptance == 0.5 })
        assertEquals(listOf(20.0), measured.map { it.prefillRate }.distinct()) // ten tokens in half a second
        assertEquals(setOf("user: x", "user: y"), model.prompts.map { it.single() }.toSet())
    }

    @Test
    fun theDocumentHasFactsAndFigures() {
        val comparison = Comparison(10.0, 25.0, 2.5, true, 64, 5)
        val figures = listOf(Measured("code", null, comparison, 80.0, null), Measured("prose", 4, comparison, 80.0, 0.5))
        val facts = mapOf("device" to mapOf("model" to "a \"phone\"", "max_kilohertz" to listOf(1L, null)))
        val document = JsonParser.parseString(deviceFigures(facts, figures)).asJsonObject
        assertEquals(listOf("schema_version", "device", "runs"), document.keySet().toList())
        assertEquals("""{"model":"a \"phone\"","max_kilohertz":[1,null]}""", document["device"].toString())
        val runs = document["runs"].asJsonArray.map { it.asJsonObject }
        assertEquals(listOf("\"auto\"", "4"), runs.map { it["num_draft_tokens"].toString() })
        assertTrue(runs[0]["acceptance_rate"].isJsonNull)
        assertEquals(0.5, runs[1]["acceptance_rate"].asDouble)
        assertEquals(2.5, runs[1]["ratio"].asDouble)
        assertEquals(runs[0].keySet(), runs[1].keySet())
    }
}
