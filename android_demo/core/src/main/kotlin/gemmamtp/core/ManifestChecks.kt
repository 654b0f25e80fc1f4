package gemmamtp.core

import com.google.gson.JsonObject
import java.io.File

/** Numbers in a cache buffer: larger ones cannot be meant. */
private const val MAX_BUFFER_VALUES = 1L shl 36
private const val MAX_DRAFT_TOKENS = 1024

private val KVBuffer.rowSize get() = numKeyValueHeads.toLong() * headDim

/** Inputs and outputs of each graph that are not cache buffers, in order; `per_layer` is there if its table is. */
internal val GRAPH_PORTS = mapOf(
    "target" to (
        listOf("embedded", "per_layer", "position", "window_start", "output_rows") to
            listOf("top_logits", "top_ids", "state")
        ),
    "drafter" to (listOf("embedded", "state", "position", "window_start") to listOf("draft_token", "next_state")),
)

/** Checks that the parts of a manifest fit each other; throws IllegalArgumentException. */
internal fun checkManifest(manifest: Manifest, raw: JsonObject): Unit = with(manifest) {
    require(defaultDraftTokens in 0..maxDraftTokens) { "num_draft_tokens: default must be between 0 and max" }
    require(minOf(minOf(maxSeqLen, vocabSize), minOf(hiddenSize, slidingWindow)) >= 1) {
        "max_seq_len, vocab_size, hidden_size and sliding_window must be positive"
    }
    val tokens = limits.getValue("num_tokens")
    val outputs = limits.getValue("num_outputs")
    val rows = limits.getValue("cache_rows")
    require(minOf(minOf(tokens, outputs), minOf(rows, rowMultiple)) >= 1) { "limits and row_multiple must be positive" }
    require(rows >= maxSeqLen.toLong() + rowMultiple - 1 && minOf(tokens, outputs) > maxDraftTokens) {
        "limits leave no room for max_seq_len or num_draft_tokens"
    }
    require(limits.getValue("window_rows") >= minOf(rows.toLong(), windowRows(slidingWindow, tokens))) {
        "limits leave no room for sliding_window"
    }
    require(tokens % rowMultiple == 0 && outputs % rowMultiple == 0) { "limits are not multiples of row_multiple" }
    for (name in files.keys) require(File(name).name == name) { "files names '$name', outside the bundle" }
    for (name in listOf("target", "drafter")) {
        require(graphs.getValue(name).file in files) { "the file of graph $name is not in files" }
    }
    for ((name, table) in tables) {
        for (rows in listOfNotNull(table.data, table.scales)) {
            require(rows.parts.all { it.file in files }) { "the file of table $name is not in files" }
            require(rows.parts.all { it.rows > 0 } && rows.parts.sumOf { it.rows.toLong() } == table.rows.toLong()) {
                "the parts of table $name do not have its rows"
            }
        }
        require(table.rows == vocabSize) { "table $name does not have a row for each token" }
        require(name == PER_LAYER || table.columns == hiddenSize) { "table $name is not as wide as hidden_size" }
    }
    checkFeatures(raw)
    val buffers = kv.map { it.name }
    for ((name, ports) in GRAPH_PORTS) {
        val graph = graphs.getValue(name)
        val others = graph.inputs.filter { it !in buffers } to graph.outputs.filter { it.removeSuffix("_out") !in buffers }
        val expected = ports.first.filter { it != "per_layer" || PER_LAYER in tables } to ports.second
        require(others == expected) { "graph $name has other inputs or outputs than $expected and kv.buffers" }
        require(listOf(graph.inputs, graph.outputs).all { it.toSet().size == it.size }) {
            "graph $name has two inputs or outputs of one name"
        }
    }
    require(kv.isNotEmpty() && buffers.toSet().size == kv.size && graphs.getValue("target").inputs.containsAll(buffers)) {
        "kv.buffers are not inputs of graph target, or one is there twice"
    }
    val maxRows = maxOf(rows, limits.getValue("window_rows")).toLong()
    require(kv.all { minOf(it.numKeyValueHeads, it.headDim) >= 1 && it.rowSize < MAX_BUFFER_VALUES / maxRows }) {
        "kv.buffers must have positive sizes that fit into memory"
    }
    require(maxDraftTokens <= MAX_DRAFT_TOKENS) {
        "num_draft_tokens.max is $maxDraftTokens, expected at most $MAX_DRAFT_TOKENS"
    }
}
