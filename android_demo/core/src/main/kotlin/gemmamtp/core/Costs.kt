package gemmamtp.core

import com.google.gson.JsonObject
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.util.TreeMap

/** The source of drafts whose steps take time. */
const val DRAFTER = "drafter"

/** Measurements that count; the least of them, because whatever else runs only ever adds. */
private const val RECENT = 5

/** Of each size, before sizes are chosen by their costs: the first may just have warmed up. */
private const val ENOUGH = 2

/** What a further token of a pass, and a draft step, are taken to cost beside a plain pass until they are measured. */
private const val UNKNOWN_TOKEN = 0.2
private const val UNKNOWN_STEP = 0.1

/**
 * Seconds of passes by their number of tokens, and of a draft step, each as they were lately.
 *
 * @param most drafts a round.
 * @param rowMultiple passes are filled up to a multiple of so many tokens.
 */
class Costs(most: Int, private val rowMultiple: Int = 1) {
    // None, and then the sizes that show the curve: those between are on the line.
    private val sizes = (generateSequence(1) { it * 2 }.takeWhile { it < most } + listOf(0, most)).toSortedSet()
    private val passes = TreeMap<Int, ArrayDeque<Double>>()
    private val step = ArrayDeque<Double>()
    private var known = TreeMap<Int, Double>()
    private val ratios = HashMap<Pair<Boolean, Int>, Double>()

    /** Of one draft step; null before it was measured. */
    var stepSeconds: Double? = null
        private set

    /** Count a round: its pass, and its draft steps if the drafter made the drafts. */
    fun measured(drafts: Int, verifySeconds: Double, draftSeconds: Double? = null) {
        passes.getOrPut(filled(drafts)) { ArrayDeque() }.addRecent(verifySeconds)
        if (draftSeconds != null && drafts > 0) step.addRecent(draftSeconds / drafts)
        refresh()
    }

    /** The least number of drafts, at most [room], whose round is to be measured; null if all are known enough. */
    fun unknown(room: Int): Int? =
        sizes.firstOrNull { it <= room && (passes[filled(it)]?.size ?: 0) < ENOUGH }

    /** Cost of a round of so many drafts beside a plain one. */
    fun relative(source: String, drafts: Int): Double = ratios.getOrPut((source == DRAFTER) to drafts) {
        val plain = verifySeconds(0)
        val steps = if (source == DRAFTER) drafts * (stepSeconds ?: (UNKNOWN_STEP * plain)) else 0.0
        (verifySeconds(drafts) + steps) / plain
    }

    /** Of a pass over `last` and so many drafts; on the line between those measured, and beyond them as steep. */
    fun verifySeconds(drafts: Int): Double {
        val size = filled(drafts)
        if (known.isEmpty()) return 1 + UNKNOWN_TOKEN * drafts
        val below = known.floorEntry(size)
        val above = known.ceilingEntry(size)
        if (below != null && above != null) {
            if (below.key == above.key) return below.value
            return below.value + (above.value - below.value) / (above.key - below.key) * (size - below.key)
        }
        val (first, least) = known.firstEntry()
        val (last, largest) = known.lastEntry()
        val slope = if (last > first) (largest - least) / (last - first) else UNKNOWN_TOKEN * least
        return maxOf(largest + slope * (size - last), UNKNOWN_TOKEN * least)
    }

    /** Bring what is derived up to date; mostly nothing changed, because the least of the recent ones counts. */
    private fun refresh() {
        val found = TreeMap<Int, Double>()
        var least = Double.POSITIVE_INFINITY
        for ((size, times) in passes.descendingMap()) {
            // A longer pass is never cheaper: what was slow by accident is corrected by a longer one that was not.
            least = minOf(least, times.min())
            found[size] = least
        }
        val foundStep = step.minOrNull()
        if (found == known && foundStep == stepSeconds) return
        known = found
        stepSeconds = foundStep
        ratios.clear()
    }

    /** Seconds, as they are kept in a file: of passes by their number of tokens, and of a draft step. */
    fun toJson() = JsonObject().apply {
        add("verify_seconds", JsonObject().apply { passes.forEach { (size, times) -> addProperty("$size", times.min()) } })
        addProperty("draft_step_seconds", stepSeconds)
    }

    /** Take over what [toJson] gave; throws IllegalArgumentException or another RuntimeException for anything else. */
    fun restore(facts: JsonObject) {
        val seconds = facts.getAsJsonObject("verify_seconds").entrySet().associate { it.key.toInt() to it.value.asDouble }
        val kept = facts.get("draft_step_seconds").takeIf { !it.isJsonNull }?.asDouble
        require((seconds.values + listOfNotNull(kept)).all { it > 0 && it < 1e6 } && seconds.keys.all { it >= 1 }) {
            "costs must be positive"
        }
        passes.clear()
        seconds.forEach { (size, one) -> passes[size] = ArrayDeque(List(ENOUGH) { one }) }
        kept?.let(step::addRecent)
        refresh()
    }

    private fun filled(drafts: Int) = (drafts + rowMultiple) / rowMultiple * rowMultiple
}

private fun ArrayDeque<Double>.addRecent(value: Double) {
    if (size == RECENT) removeFirst()
    addLast(value)
}

/**
 * What was measured on this device with this bundle and as many threads, else nothing.
 *
 * @throws InputError the file is not what [saveCosts] writes.
 */
fun loadCosts(file: File, manifest: Manifest, threads: Int?): Costs {
    val costs = Costs(manifest.maxDraftTokens, manifest.rowMultiple)
    if (!file.exists()) return costs
    try {
        val kept = readJson(file, "costs that were measured; delete the file, and they are measured again").asJsonObject
        if (kept.get("of") == identity(manifest, threads)) costs.restore(kept)
    } catch (error: RuntimeException) {
        val reason = "${error.javaClass.simpleName}: ${oneLine(error)}"
        throw InputError("$file: not the costs of a bundle ($reason); delete it, and they are measured again", error)
    }
    return costs
}

/** Keep costs for [loadCosts], written aside and renamed. */
@Throws(IOException::class)
fun saveCosts(costs: Costs, file: File, manifest: Manifest, threads: Int?) {
    val aside = File(file.path + ".new")
    val text = costs.toJson().apply { add("of", identity(manifest, threads)) }.toString()
    FileOutputStream(aside).use {
        it.write(text.toByteArray())
        // Else it may be empty after the battery fails, and the bundle is refused until somebody deletes it.
        it.fd.sync()
    }
    if (!aside.renameTo(file)) throw IOException("$file: cannot be replaced")
}

/** What costs depend on besides the device, whose storage keeps them: the bundle with all its digests, and threads. */
private fun identity(manifest: Manifest, threads: Int?) = JsonObject().apply {
    addProperty("bundle", manifest.digest)
    addProperty("threads", threads)
}
