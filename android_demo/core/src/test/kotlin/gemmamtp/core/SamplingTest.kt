package gemmamtp.core

import com.google.gson.JsonObject
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Sampling, on the test vectors of all languages. */
class SamplingTest {
    private val cases = vectors("sampling.json")

    private fun JsonObject.seed() = string("seed").toULong().toLong()

    @Test
    fun noise() {
        for (row in cases.rows("noise")) {
            val noise = uniform(row.seed(), row.get("position").asInt) * (1 shl 24)
            assertEquals(row.get("u_times_2_to_the_24").asDouble, noise, "$row")
        }
    }

    @Test
    fun chosenTokens() {
        val rows = cases.rows("choose")
        assertTrue(rows.size > 150)
        for (row in rows) {
            val (temperature, topP) = listOf("temperature", "top_p").map { row.get(it).asDouble }
            val sampling = Sampling(temperature, topP, row.seed(), row.get("top_k").asInt)
            val logits = row.getAsJsonArray("logits").map { it.asFloat }.toFloatArray()
            val rank = choose(logits, row.get("position").asInt, sampling)
            assertEquals(row.get("token").asInt, row.getAsJsonArray("ids").get(rank).asInt, "$row")
        }
    }

    @Test
    fun logProbabilitiesSumToOne() {
        val logits = floatArrayOf(3f, 2.5f, -1f, -40f)
        assertEquals(1.0, logits.indices.sumOf { kotlin.math.exp(logProbability(logits, it)) }, 1e-12)
        assertEquals(0.5, logProbability(logits, 0) - logProbability(logits, 1), 1e-12)
    }

    @Test
    fun impossibleOptions() {
        for (
            (expected, make) in listOf(
                "temperature is -1.0" to { Sampling(-1.0) },
                "temperature is NaN" to { Sampling(Double.NaN) },
                "top-p is 0.0" to { Sampling(1.0, 0.0) },
                "top-k is 65, expected 1 to 64" to { Sampling(1.0, topK = 65) },
            )
        ) {
            assertTrue(expected in assertFailsWith<InputError> { make() }.message!!)
        }
    }
}
