package gemmamtp.demo

import com.google.gson.GsonBuilder
import com.google.gson.JsonArray
import com.google.gson.JsonObject

/** Changes when a program that reads the document must change. */
private const val SCHEMA_VERSION = 1

/** Texts of a device's benchmark by name: repetitive and not, and one that is not English. */
val BENCHMARK_PROMPTS = mapOf(
    "code" to "Write a Python class for a bank account with methods to deposit, withdraw and transfer money. Add docstrings.",
    "prose" to "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
    "german" to "Erkläre in einfachen Worten, warum der Himmel blau leuchtet und der Abend rot.",
)

/**
 * What one prompt takes with one way to draft.
 *
 * @property drafts K of the speculative runs; null for the planner's.
 * @property prefillRate tokens of the prompt a second, the fastest.
 * @property acceptance accepted drafts / drafts of the last run that drafted; null if none did.
 */
class Measured(
    val prompt: String,
    val drafts: Int?,
    val comparison: Comparison,
    val prefillRate: Double,
    val acceptance: Double?,
)

/** Compare plain and speculative decoding, with the bundle's K and the planner's, on each prompt. */
fun measure(model: Model, prompts: Map<String, String> = BENCHMARK_PROMPTS, report: Report): List<Measured> =
    prompts.flatMap { (name, prompt) ->
        listOf(model.defaultDraftTokens, null).map { drafts ->
            var rate = 0.0
            var acceptance: Double? = null
            val comparison = benchmark(model, prompt, drafts, report) { writing ->
                val tokens = writing.asSequence().map { it.id }.toList()
                val counts = writing.counts
                val promptTokens = model.contextTokens - counts.tokensLeft - counts.tokens
                if (counts.prefillSeconds > 0) rate = maxOf(rate, promptTokens / counts.prefillSeconds)
                acceptance = counts.acceptanceRate ?: acceptance
                tokens
            }
            Measured(name, drafts, comparison, rate, acceptance)
        }
    }

/**
 * The document that `docs/devices.md` asks for.
 *
 * @param facts of the device, the app and the bundle, by name; numbers, texts or lists of numbers.
 */
fun deviceFigures(facts: Map<String, Map<String, Any?>>, figures: List<Measured>): String {
    val document = JsonObject()
    document.addProperty("schema_version", SCHEMA_VERSION)
    val gson = GsonBuilder().serializeNulls().setPrettyPrinting().create()
    for ((name, values) in facts) document.add(name, gson.toJsonTree(values))
    val runs = JsonArray()
    for (measured in figures) {
        val values = mapOf(
            "prompt" to measured.prompt,
            "num_draft_tokens" to (measured.drafts ?: "auto"),
            "tokens" to measured.comparison.tokens,
            "turns" to measured.comparison.runs,
            "prefill_tokens_per_second" to measured.prefillRate,
            "plain_tokens_per_second" to measured.comparison.plain,
            "speculative_tokens_per_second" to measured.comparison.drafted,
            "ratio" to measured.comparison.ratio,
            "acceptance_rate" to measured.acceptance,
            "tokens_equal" to measured.comparison.equal,
        )
        runs.add(gson.toJsonTree(values))
    }
    document.add("runs", runs)
    return gson.toJson(document)
}
