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
    private val parts = """[{"file": "w", "offset": 0, "rows": 10}]"""
    private val layers = """"num_hidden_layers": 1, "layer_types": ["sliding_attention"]"""
    private val layout = """["num_key_value_heads", "rows", "head_dim"]"""
    private val text = """
        {"format_version": 3, "requires": [], "backend": {"name": "onnx", "min_runtime": "1.25"}, "recipe": "fp32", "max_seq_len": 64,
         "num_draft_tokens": {"default": 4, "max": 8}, "row_multiple": 2,
         "limits": {"num_tokens": 16, "num_outputs": 16, "cache_rows": 65, "window_rows": 256},
         "tokens": {"bos": 2, "pad": 0, "eos": [1, 106]}, "sampling": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
         "target": {"vocab_size": 10, "hidden_size": 4, "sliding_window": 8, $layers}, "two_stage": null,
         "drafter": {"text": {"vocab_size": 10, "hidden_size": 4, "sliding_window": 8, $layers}},
         "source": {"target": {"files": {}}, "drafter": {"files": {}}},
         "kv": {"buffers": [{"name": "key_0", "layer": 0, "layer_type": "sliding_attention", "num_key_value_heads": 1,
                             "head_dim": 2, "dtype": "float32", "layout": $layout}]},
         "graphs": {"target": {"file": "w", "inputs": [{"name": "embedded"}, {"name": "per_layer"}, {"name": "position"},
                                          {"name": "window_start"}, {"name": "output_rows"}, {"name": "key_0"}],
                               "outputs": [{"name": "top_logits"}, {"name": "top_ids"}, {"name": "state"},
                                           {"name": "key_0_out"}]},
                    "drafter": {"file": "w", "inputs": [{"name": "embedded"}, {"name": "state"}, {"name": "position"},
                                           {"name": "window_start"}],
                                "outputs": [{"name": "draft_token"}, {"name": "next_state"}]}},
         "tables": {"embed_tokens": {"rows": 10, "columns": 4, "row_bytes": 16, "encoding": "float32", "group_size": 4,
                                     "data": {"parts": $parts}},
                    "embed_tokens_per_layer": {"rows": 10, "columns": 4, "row_bytes": 2, "encoding": "uint4",
                                               "group_size": 4, "data": {"parts": $parts},
                                               "scales": {"dtype": "bfloat16", "parts": $parts}}},
         "files": {"w": {"size": 3, "sha256": "x"}}, "something new": [1]}
    """.trimIndent()

    private fun changed(change: (JsonObject) -> Unit): String {
        val json = JsonParser.parseString(text).asJsonObject.also(change)
        return assertFailsWith<InputError> { parseManifest(json, "bundle/manifest.json", "") }.message!!
    }

    @Test
    fun optionalFieldsAreRead() {
        val json = JsonParser.parseString(text).asJsonObject
        json.getAsJsonObject("sampling").addProperty("repetition_penalty", 1.1)
        json.getAsJsonObject("target").addProperty("final_logit_softcapping", 30)
        json.getAsJsonObject("tokens").add("suppressed", JsonParser.parseString("[5, 7]"))
        json.getAsJsonObject("tokens").add("channels", JsonParser.parseString("""{"thought": [3, 9]}"""))
        val manifest = parseManifest(json, "", "d")
        assertEquals(mapOf(THOUGHT to (3 to 9)), manifest.channels)
        json.getAsJsonObject("tokens").add("channels", JsonParser.parseString("""{"thought": [3, 10]}"""))
        assertEquals(emptyMap(), parseManifest(json, "", "d").channels)
        assertEquals(listOf(1.1, 30.0), listOf(manifest.repetitionPenalty, manifest.finalLogitSoftcapping))
        assertEquals(setOf(5, 7), manifest.suppressed)
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
        assertEquals(listOf(1.0, 0.0), listOf(manifest.repetitionPenalty, manifest.finalLogitSoftcapping))
        assertEquals(emptySet(), manifest.suppressed)
        assertEquals("key_0", manifest.graphs.getValue("target").inputs.last())
        assertEquals(listOf(true), manifest.kv.map { it.sliding })
        assertEquals("bfloat16", manifest.tables.getValue("embed_tokens_per_layer").scales?.dtype)
        assertEquals(listOf(null, null, null), listOf(manifest.chat, manifest.tools, chatTemplate(manifest)))
    }

    @Test
    fun featuresAreRead() {
        val json = JsonParser.parseString(text).asJsonObject
        json.getAsJsonObject("tokens").add("channels", JsonParser.parseString("""{"thought": [1, 2], "tool_call": [3, 4]}"""))
        json.getAsJsonObject("tables").remove("embed_tokens_per_layer")
        json.ports("target", "inputs").remove(1)
        json.getAsJsonObject("tables").apply { add("head", get("embed_tokens")) }
        json.getAsJsonObject("kv").getAsJsonArray("buffers")[0].asJsonObject.apply {
            addProperty("dtype", "float16")
            add("layout", JsonParser.parseString("""["rows", "head_dim", "num_key_value_heads"]"""))
        }
        val names = FEATURES.keys - "split-tables"
        json.add("requires", JsonParser.parseString(names.joinToString(",", "[", "]") { """{"name": "$it", "since": "0.2.0"}""" }))
        val forms = vectors("conversation.json").getAsJsonArray("conversation_forms")
        json.add("conversations", forms)
        json.add("tools", JsonParser.parseString("""[{"type": "function"}]"""))
        val manifest = parseManifest(json, "", "d")
        assertEquals(forms.size() to """[{"type":"function"}]""", manifest.conversations.size to manifest.tools)
        assertEquals(mapOf("thought" to (1 to 2), "tool_call" to (3 to 4)), manifest.channels)
        assertEquals(setOf(EMBEDDING, "head"), manifest.tables.keys)
        assertEquals(KVType.FLOAT16, manifest.kv[0].type)
        assertEquals(0 to listOf(0, 2, 1), manifest.kv[0].rowsAxis to manifest.kv[0].sizes)
        assertEquals("1.25", manifest.minRuntime)
    }

    @Test
    fun versionsAreComparedByTheirNumbers() {
        assertEquals(listOf(1, 31, 1), versionNumbers("1.31.1rc2"))
        val manifest = parseManifest(JsonParser.parseString(text), "", "d")
        for (newer in listOf("1.25", "1.25.1", "1.100", "2")) requireRuntime(File("b"), manifest, "Library", newer)
        for (older in listOf("1.24.4", "1.3", "0.99", "1")) {
            val error = assertFailsWith<InputError> { requireRuntime(File("b"), manifest, "Library", older) }
            assertEquals("b: needs Library 1.25 or later, the app has $older; update the app", error.message)
        }
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
                "format_version is 4, this version reads 2 and 3; update the app" to { it.addProperty("format_version", 4) },
                "format_version is 1, this version reads 2 and 3; export" to { it.addProperty("format_version", 1) },
                "format_version is null" to { it.remove("format_version") },
                "recipe is missing" to { it.remove("recipe") },
                "max_seq_len is \"many\", expected a whole number" to { it.addProperty("max_seq_len", "many") },
                "default must be between 0 and max" to { it.getAsJsonObject("num_draft_tokens").addProperty("default", 9) },
                "limits leave no room for max_seq_len" to { it.addProperty("max_seq_len", 65) },
                "limits are not multiples" to { it.getAsJsonObject("limits").addProperty("num_tokens", 15) },
                "sampling.repetition_penalty is 0, expected a number from 0.01 to 100" to
                    { it.getAsJsonObject("sampling").addProperty("repetition_penalty", 0) },
                "target.final_logit_softcapping is true, expected a number" to
                    { it.getAsJsonObject("target").addProperty("final_logit_softcapping", true) },
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
                "tokens.channels.thought is [1], expected two" to {
                    it.getAsJsonObject("tokens").add("channels", JsonParser.parseString("""{"thought": [1]}"""))
                },
                "kv buffer key_0 is int8" to {
                    it.getAsJsonObject("kv").getAsJsonArray("buffers")[0].asJsonObject.addProperty("dtype", "int8")
                },
                "the parts of table embed_tokens do not have its rows" to {
                    it.getAsJsonObject("tables").getAsJsonObject("embed_tokens").getAsJsonObject("data")
                        .getAsJsonArray("parts")[0].asJsonObject.addProperty("rows", 9)
                },
                "requires is null, expected a list of objects" to { it.remove("requires") },
                "requires is [1], expected a list of objects" to { it.add("requires", JsonParser.parseString("[1]")) },
                "needs the feature 'tensors', which gemma-mtp-export 9.1.0 brought and this version does not have" to {
                    it.add("requires", JsonParser.parseString("""[{"name": "tensors", "since": "9.1.0"}]"""))
                    it.remove("kv")
                },
                "requires does not name channels, which the manifest uses" to {
                    it.getAsJsonObject("tokens").add("channels", JsonParser.parseString("""{"tool_call": [3, 4]}"""))
                },
                "requires does not name no-per-layer-embeddings" to {
                    it.getAsJsonObject("tables").remove("embed_tokens_per_layer")
                    it.ports("target", "inputs").remove(1)
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
        assertEquals(manifest.digest, readManifest(bundle, manifest.digest.uppercase()).digest)
        val other = assertFailsWith<InputError> { readManifest(bundle, "00") }.message!!
        assertTrue("has the sha256 ${manifest.digest}, expected 00; this is not the bundle that was meant" in other)
        File(bundle, "target.weights").writeText("of another export")
        assertTrue("target.weights: not named in manifest.json" in error())
        File(bundle, "w").delete()
        assertTrue("/w: cannot be read" in assertFailsWith<InputError> { changedFiles(bundle, manifest) }.message!!)
    }
}
