package gemmamtp.core

import com.google.gson.JsonObject
import java.io.File
import java.io.IOException
import java.util.TreeMap

/** The source of drafts whose steps take time. */
internal const val DRAFTER = "drafter"

/** The newest measurements of each pass, of which the smallest counts: whatever else runs only ever adds time. */
private const val MAX_MEASUREMENTS = 5

/** Measurements of each pass before K is chosen by its time: the first may include warming up. */
private const val MIN_MEASUREMENTS = 2

/** Assumed times before anything is measured, in plain passes: of each further token of a pass, and of a draft step. */
private const val ASSUMED_TOKEN_PASSES = 0.2
private const val ASSUMED_STEP_PASSES = 0.1

/**
 * Recent times of passes by their number of tokens, and of a draft step.
 *
 * @param maxDrafts the largest K of a round.
 * @param rowMultiple passes are padded to a multiple of this many tokens, so those of equal length share a time.
 */
internal class Costs(maxDrafts: Int, private val rowMultiple: Int = 1) {
    // Numbers of drafts that are measured: 0, powers of two and the maximum; those between are interpolated.
    private val sizes = (generateSequence(1) { it * 2 }.takeWhile { it < maxDrafts } + listOf(0, maxDrafts)).toSortedSet()
    private val passes = TreeMap<Int, ArrayDeque<Double>>()
    private val step = ArrayDeque<Double>()
    private var known = TreeMap<Int, Double>()
    private val ratios = HashMap<Pair<Boolean, Int>, Double>()

    /** Time of one draft step; null before it was measured. */
    var stepSeconds: Double? = null
        private set

    /**
     * Add the times of a round.
     *
     * @param drafts K of the round.
     * @param verifySeconds time of its pass.
     * @param draftSeconds time of its K draft steps; null if the drafts did not come from the drafter.
     */
    fun record(drafts: Int, verifySeconds: Double, draftSeconds: Double? = null) {
        passes.getOrPut(passTokens(drafts)) { ArrayDeque() }.addRecent(verifySeconds)
        if (draftSeconds != null && drafts > 0) step.addRecent(draftSeconds / drafts)
        refresh()
    }

    /** Drop all measurements: the device is not as fast as it was. */
    fun forget() {
        passes.clear()
        step.clear()
        refresh()
    }

    /** The smallest K, at most [maxDrafts], that has too few measurements; null if all have enough. */
    fun nextToMeasure(maxDrafts: Int): Int? =
        sizes.firstOrNull { it <= maxDrafts && (passes[passTokens(it)]?.size ?: 0) < MIN_MEASUREMENTS }

    /** Time of a round of [drafts] drafts from a source, in plain passes. */
    fun relative(source: String, drafts: Int): Double = ratios.getOrPut((source == DRAFTER) to drafts) {
        val plain = verifySeconds(0)
        val steps = if (source == DRAFTER) drafts * (stepSeconds ?: (ASSUMED_STEP_PASSES * plain)) else 0.0
        (verifySeconds(drafts) + steps) / plain
    }

    /**
     * Time of a pass over the last token and [drafts] drafts.
     *
     * It is interpolated linearly between measured passes and extrapolated beyond them; in plain passes, not seconds,
     * before anything is measured.
     */
    fun verifySeconds(drafts: Int): Double {
        val tokens = passTokens(drafts)
        if (known.isEmpty()) return 1 + ASSUMED_TOKEN_PASSES * drafts
        val below = known.floorEntry(tokens)
        val above = known.ceilingEntry(tokens)
        if (below != null && above != null) {
            if (below.key == above.key) return below.value
            return below.value + (above.value - below.value) / (above.key - below.key) * (tokens - below.key)
        }
        val (first, smallest) = known.firstEntry()
        val (last, largest) = known.lastEntry()
        val slope = if (last > first) (largest - smallest) / (last - first) else ASSUMED_TOKEN_PASSES * smallest
        return maxOf(largest + slope * (tokens - last), ASSUMED_TOKEN_PASSES * smallest)
    }

    /** Recompute the derived times; mostly nothing changed, because the smallest of the recent ones counts. */
    private fun refresh() {
        val new = TreeMap<Int, Double>()
        var smallest = Double.POSITIVE_INFINITY
        for ((tokens, times) in passes.descendingMap()) {
            // A longer pass is never cheaper: a time that was slow by accident is corrected by a longer pass's.
            smallest = minOf(smallest, times.min())
            new[tokens] = smallest
        }
        val newStep = step.minOrNull()
        if (new == known && newStep == stepSeconds) return
        known = new
        stepSeconds = newStep
        ratios.clear()
    }

    /** The costs as they are kept in a file: seconds of passes by number of tokens, and of a draft step. */
    internal fun toJson() = JsonObject().apply {
        add("verify_seconds", JsonObject().apply { passes.forEach { (size, times) -> addProperty("$size", times.min()) } })
        addProperty("draft_step_seconds", stepSeconds)
    }

    /**
     * Replace the measurements by saved ones.
     *
     * @param saved what [toJson] returned; for anything else IllegalArgumentException or another RuntimeException is
     *     thrown.
     */
    internal fun restore(saved: JsonObject) {
        val seconds = saved.getAsJsonObject("verify_seconds").entrySet().associate { it.key.toInt() to it.value.asDouble }
        val savedStep = saved.get("draft_step_seconds").takeIf { !it.isJsonNull }?.asDouble
        require((seconds.values + listOfNotNull(savedStep)).all { it > 0 && it < 1e6 } && seconds.keys.all { it >= 1 }) {
            "costs must be positive"
        }
        passes.clear()
        seconds.forEach { (size, one) -> passes[size] = ArrayDeque(List(MIN_MEASUREMENTS) { one }) }
        savedStep?.let(step::addRecent)
        refresh()
    }

    /** Tokens of the pass that verifies so many drafts, padding included. */
    private fun passTokens(drafts: Int) = roundUp(drafts + 1, rowMultiple)
}

private fun ArrayDeque<Double>.addRecent(value: Double) {
    if (size == MAX_MEASUREMENTS) removeFirst()
    addLast(value)
}

/**
 * Load the costs that were measured with this bundle on this device, else return costs without measurements.
 *
 * @param threads threads inside an operation; costs that were measured with another number are ignored.
 * @throws InputError the file is not what [saveCosts] writes.
 */
internal fun loadCosts(file: File, manifest: Manifest, threads: Int): Costs {
    val costs = Costs(manifest.maxDraftTokens, manifest.rowMultiple)
    if (!file.exists()) return costs
    try {
        val saved = readJson(file, "measured costs; delete the file, and they are measured again").asJsonObject
        if (saved.get("of") == identity(manifest, threads)) costs.restore(saved)
    } catch (error: InputError) {
        throw error
    } catch (error: RuntimeException) {
        val reason = "${error.javaClass.simpleName}: ${oneLine(error)}"
        throw InputError("$file: not the costs of a bundle ($reason); delete it, and they are measured again", error)
    }
    return costs
}

/** Write costs to the file that [loadCosts] reads, whole or not at all. */
@Throws(IOException::class)
internal fun saveCosts(costs: Costs, file: File, manifest: Manifest, threads: Int) {
    val text = costs.toJson().apply { add("of", identity(manifest, threads)) }.toString()
    writeWhole(file) { it.write(text.toByteArray()) }
}

/** What costs depend on besides the device, whose storage has them: threads, and the bundle, by its manifest's digest. */
private fun identity(manifest: Manifest, threads: Int) = JsonObject().apply {
    addProperty("bundle", manifest.digest)
    addProperty("threads", threads)
}
