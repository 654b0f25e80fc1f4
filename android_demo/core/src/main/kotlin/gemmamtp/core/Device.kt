package gemmamtp.core

import java.io.File
import java.io.IOException
import java.nio.ByteBuffer

private const val CPUS = "/sys/devices/system/cpu"

/** Slower cores than these fractions of the fastest are little ones. Capacities also tell architectures apart. */
private const val MIN_CAPACITY = 0.5
private const val MIN_FREQUENCY = 0.8

/** What a decoder asks of the device that it runs on, and tells it. One pass runs at a time, on any thread. */
public interface Device {
    /** How many cores decode; threads on little ones make the others wait. */
    public val fastCores: Int get() = fastCores(File(CPUS))

    /**
     * How hot the device is, in steps of its own; 0 if it is not slowed down.
     *
     * It is asked after each pass. When it changes, times of passes are measured anew, because heat slows them down unevenly.
     */
    public val heat: Int get() = 0

    /**
     * Memory for keys and values: so many bytes of zeros in direct memory of native byte order, freed with the buffer.
     *
     * @throws OutOfMemoryError there is none.
     */
    public fun allocate(bytes: Long): ByteBuffer = direct(bytes)

    /**
     * Called after each pass, on the thread that ran it.
     *
     * @param graph its name in the manifest.
     * @param tokens how many tokens it ran.
     */
    public fun passed(graph: String, tokens: Int, nanoseconds: Long): Unit = Unit
}

/** A device of which nothing more is known. */
public object AnyDevice : Device

/**
 * How many of the cores decode: those that are not much slower than the fastest.
 *
 * Where the system tells neither capacities nor frequencies, it is half of the cores, as ExecuTorch assumes of phones.
 *
 * @param cpus the folder in which Linux describes them.
 */
internal fun fastCores(cpus: File, processors: Int = Runtime.getRuntime().availableProcessors()): Int {
    val cores = cpus.listFiles { file -> CORE.matches(file.name) }.orEmpty()
    for ((file, fraction) in listOf("cpu_capacity" to MIN_CAPACITY, "cpufreq/cpuinfo_max_freq" to MIN_FREQUENCY)) {
        val speeds = cores.mapNotNull { number(File(it, file)) }
        if (speeds.isEmpty() || speeds.size < cores.size) continue
        return speeds.count { it >= fraction * speeds.max() }.coerceAtMost(processors)
    }
    return (processors + 1) / 2
}

private val CORE = Regex("cpu[0-9]+")

private fun number(file: File): Long? = try {
    file.readText().trim().toLongOrNull()
} catch (_: IOException) {
    null
}

/** Lets a device know of each pass, and costs be measured anew when its heat changes. */
internal class Watch(private val device: Device, private val costs: Costs) {
    private var heat = 0 // costs that were kept are those of a cool device

    /** Whether costs are to be kept. */
    val cool get() = heat == 0

    fun watched(graphs: Map<String, BoundGraph>): Map<String, BoundGraph> = graphs.mapValues { (name, graph) -> Watched(name, graph) }

    private inner class Watched(private val name: String, private val graph: BoundGraph) : BoundGraph by graph {
        override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
            val begun = System.nanoTime()
            val outputs = graph.run(inputs)
            device.passed(name, inputs.getValue("embedded").shape[0].toInt(), System.nanoTime() - begun)
            val now = device.heat
            if (now != heat) costs.forget()
            heat = now
            return outputs
        }
    }
}
