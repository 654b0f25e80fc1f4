package gemmamtp.core

import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Reading manifests, and the errors of malformed ones. */
class ManifestTest {
    private val tables = """{"file": "w", "offset": 0}"""
    private val text = """
        {"format_version": 2, "backend": {"name": "onnx"}, "recipe": "fp32", "max_seq_len": 64,
         "num_draft_tokens": {"default": 4, "max": 8}, "row_multiple": 2,
         "limits": {"num_tokens": 16, "num_outputs": 16, "cache_rows": 65, "window_rows": 256},
         "tokens": {"bos": 2, "pad": 0, "eos": [1, 106]}, "sampling": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
         "target": {"vocab_size": 10, "hidden_size": 4, "sliding_window": 8}, "drafter": {}, "two_stage": null, "source": {},
         "kv": {"buffers": [{"name": "key_0", "layer": 0, "layer_type": "sliding_attention", "num_key_value_heads": 1,
                             "head_dim": 2}]},
         "graphs": {"target": {"file": "w", "inputs": [{"name": "embedded"}, {"name": "per_layer"}, {"name": "position"},
                                          {"name": "window_start"}, {"name": "output_rows"}, {"name": "key_0"}],
                               "outputs": [{"name": "top_logits"}, {"name": "top_ids"}, {"name": "state"},
                                           {"name": "key_0_out"}]},
                    "drafter": {"file": "w", "inputs": [{"name": "embedded"}, {"name": "state"}, {"name": "position"},
                                           {"name": "window_start"}],
                                "outputs": [{"name": "draft_token"}, {"name": "next_state"}]}},
         "tables": {"embed_tokens": {"rows": 10, "columns": 4, "row_bytes": 16, "encoding": "float32", "group_size": 4,
                                     "data": $tables},
                    "embed_tokens_per_layer": {"rows": 10, "columns": 4, "row_bytes": 2, "encoding": "uint4",
                                               "group_size": 4, "data": $tables,
                                               "scales": {"file": "w", "offset": 9, "dtype": "bfloat16"}}},
         "files": {"w": {"size": 3, "sha256": "x"}}, "something new": [1]}
    """.trimIndent()

    private fun changed(change: (JsonObject) -> Unit): String {
        val json = JsonParser.parseString(text).asJsonObject.also(change)
        return assertFailsWith<InputError> { parseManifest(json, "bundle/manifest.json", "") }.message!!
    }

    private fun JsonObject.ports(graph: String, way: String) =
        getAsJsonObject("graphs").getAsJsonObject(graph).getAsJsonArray(way)

    private fun port(name: String) = JsonObject().apply { addProperty("name", name) }

    @Test
    fun fieldsAreRead() {
        val manifest = parseManifest(JsonParser.parseString(text), "", "d")
        assertEquals("onnx", manifest.backend)
        assertEquals(setOf(1, 106), manifest.eos)
        assertEquals(Sampling(1.0, 0.95), manifest.sampling)
        assertEquals("key_0", manifest.graphs.getValue("target").inputs.last())
        assertEquals(listOf(true), manifest.kv.map { it.sliding })
        assertEquals("bfloat16", manifest.tables.getValue("embed_tokens_per_layer").scales?.dtype)
        assertEquals(null, manifest.chat)
    }

    @Test
    fun passesArePaddedForTheProcessor() {
        val json = JsonParser.parseString(text).asJsonObject
        assertEquals(listOf(2, 2), listOf(false, true).map { parseManifest(json, "", "", arm64 = it).rowMultiple })
        json.addProperty("row_multiple_arm64", 4)
        json.getAsJsonObject("limits").addProperty("cache_rows", 67)
        assertEquals(listOf(2, 4), listOf(false, true).map { parseManifest(json, "", "", arm64 = it).rowMultiple })
    }

    @Test
    fun malformedManifestsAreRefused() {
        for (
            (expected, change) in listOf<Pair<String, (JsonObject) -> Unit>>(
                "format_version is 3, this version reads 2; export it again" to { it.addProperty("format_version", 3) },
                "format_version is null" to { it.remove("format_version") },
                "recipe is missing" to { it.remove("recipe") },
                "max_seq_len is \"many\", expected a whole number" to { it.addProperty("max_seq_len", "many") },
                "default must be between 0 and max" to { it.getAsJsonObject("num_draft_tokens").addProperty("default", 9) },
                "limits leave no room for max_seq_len" to { it.addProperty("max_seq_len", 65) },
                "limits are not multiples" to { it.getAsJsonObject("limits").addProperty("num_tokens", 15) },
                "temperature is -1.0" to { it.getAsJsonObject("sampling").addProperty("temperature", -1) },
                "graph target has other inputs or outputs" to { it.ports("target", "inputs").remove(1) },
                "graph drafter has other inputs or outputs" to { it.ports("drafter", "outputs").remove(0) },
                "two inputs or outputs of one name" to { it.ports("drafter", "inputs").apply { repeat(2) { add(port("key_0")) } } },
                "kv.buffers are not inputs of graph target, or one is there twice" to {
                    it.getAsJsonObject("kv").getAsJsonArray("buffers").apply { add(get(0)) }
                },
                "that fit into memory" to {
                    it.getAsJsonObject("kv").getAsJsonArray("buffers")[0].asJsonObject.addProperty("head_dim", 1 shl 30)
                },
                "num_draft_tokens.max is 2000, expected at most 1024" to {
                    it.getAsJsonObject("num_draft_tokens").addProperty("max", 2000)
                    it.getAsJsonObject("limits").addProperty("num_tokens", 4096)
                    it.getAsJsonObject("limits").addProperty("num_outputs", 4096)
                    it.getAsJsonObject("limits").addProperty("window_rows", 8192)
                },
                "tokens.thoughts is [1], expected two" to {
                    it.getAsJsonObject("tokens").add("thoughts", JsonParser.parseString("[1]"))
                },
                "outside the bundle" to { it.getAsJsonObject("files").add("../w", it.getAsJsonObject("files").get("w")) },
                "table embed_tokens is not as wide" to {
                    it.getAsJsonObject("tables").getAsJsonObject("embed_tokens").addProperty("columns", 5)
                },
            )
        ) {
            val message = changed(change)
            assertTrue(expected in message && '\n' !in message, "$expected: $message")
            assertTrue(message.startsWith("bundle/manifest.json: "), message)
        }
    }

    @Test
    fun missingAndChangedFilesAreRefused() = inTemporaryDirectory { bundle ->
        fun error() = assertFailsWith<InputError> { readManifest(bundle) }.message!!
        assertTrue("not a bundle, manifest.json is missing" in error())
        File(bundle, MANIFEST).writeText("{")
        assertTrue("cannot be read as JSON" in error())
        File(bundle, MANIFEST).writeText(text)
        assertTrue("named in manifest.json but absent" in error())
        File(bundle, "w").writeBytes(byteArrayOf(1, 2))
        assertTrue("is 2 bytes, manifest.json says 3" in error())
        File(bundle, "w").writeBytes("abc".toByteArray())
        assertEquals(listOf("w"), changedFiles(bundle, readManifest(bundle)))
        assertEquals("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", fileSha256(File(bundle, "w")))
        val manifest = readManifest(bundle)
        File(bundle, "target.weights").writeText("of another export")
        assertTrue("target.weights: not named in manifest.json" in error())
        File(bundle, "w").delete()
        assertTrue("/w: cannot be read" in assertFailsWith<InputError> { changedFiles(bundle, manifest) }.message!!)
    }
}
