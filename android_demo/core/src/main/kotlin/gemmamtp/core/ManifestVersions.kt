package gemmamtp.core

import com.google.gson.JsonArray
import com.google.gson.JsonObject

private const val OLDEST_ONNXRUNTIME = "1.25"
private val TABLES_OF_FORMAT_2 = listOf(EMBEDDING, PER_LAYER)

/** A manifest of format 2 in the form of format 3: the reader knows one form. */
internal fun fromFormat2(manifest: JsonObject): JsonObject {
    val raw = manifest.deepCopy()
    raw.addProperty("format_version", 3)
    raw.add("requires", JsonArray())
    val backend = raw.getAsJsonObject("backend")
    when (backend.get("name").asString) {
        "onnx" -> backend.addProperty("min_runtime", OLDEST_ONNXRUNTIME)
        "executorch" -> backend.get("executorch")?.let { backend.add("min_runtime", it) }
    }
    val rows = raw.getAsJsonObject("target").get("vocab_size")
    for (table in TABLES_OF_FORMAT_2.map(raw.getAsJsonObject("tables")::getAsJsonObject)) {
        for (place in listOf("data", "scales").mapNotNull(table::getAsJsonObject)) {
            val part = JsonObject()
            for (key in listOf("file", "offset")) part.add(key, place.remove(key))
            part.add("rows", rows)
            place.add("parts", JsonArray().apply { add(part) })
        }
    }
    raw.getAsJsonObject("tokens").apply {
        remove("thoughts")?.takeIf { !it.isJsonNull }?.let { marks ->
            add("channels", JsonObject().apply { add(THOUGHT, marks) })
        }
    }
    for (buffer in raw.getAsJsonObject("kv").getAsJsonArray("buffers").map { it.asJsonObject }) {
        buffer.addProperty("dtype", "float32")
        buffer.add("layout", JsonArray().apply { HEADS_FIRST.forEach(::add) })
    }
    raw.getAsJsonObject("tables").keySet().retainAll(TABLES_OF_FORMAT_2.toSet())
    return raw
}
