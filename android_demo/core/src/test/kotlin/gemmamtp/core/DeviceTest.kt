package gemmamtp.core

import java.io.File
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class DeviceTest {
    private val folder = File.createTempFile("device", null).apply { check(delete() && mkdir()) }

    /** A folder in which Linux describes cores with these files; null is none. */
    private fun cpus(vararg cores: Map<String, Any>): File {
        val cpus = File(folder, "${folder.list()!!.size}")
        File(cpus, "cpufreq").mkdirs()
        for ((i, files) in cores.withIndex()) {
            File(cpus, "cpu$i").mkdir()
            for ((name, content) in files) File(cpus, "cpu$i/$name").apply { parentFile.mkdirs() }.writeText("$content\n")
        }
        return cpus
    }

    private fun speeds(file: String, vararg speeds: Int) = cpus(*speeds.map { mapOf(file to it) }.toTypedArray())

    private fun frequencies(vararg megahertz: Int) =
        speeds("cpufreq/cpuinfo_max_freq", *megahertz.map { it * 1000 }.toIntArray())

    @Test
    fun threadsAreAsManyAsFastCores() {
        assertEquals(4, fastCores(frequencies(1800, 1800, 1800, 1800, 2400, 2400, 2400, 2900), 8))
        assertEquals(8, fastCores(frequencies(3500, 3500, 3500, 3500, 3500, 3500, 4300, 4300), 8))
        assertEquals(8, fastCores(frequencies(2000, 2000, 2000, 2000, 2000, 2000, 2000, 2000), 8))
        assertEquals(3, fastCores(frequencies(2000, 2000, 2000, 2000), 3), "no more than the process may use")
        assertEquals(4, fastCores(speeds("cpu_capacity", 250, 250, 250, 250, 800, 800, 800, 1024), 8))
        // Little cores at a high frequency: capacities tell them.
        val little = mapOf("cpu_capacity" to 300, "cpufreq/cpuinfo_max_freq" to 2_000_000)
        val big = mapOf("cpu_capacity" to 1024, "cpufreq/cpuinfo_max_freq" to 2_200_000)
        assertEquals(2, fastCores(cpus(little, little, little, little, big, big), 6))
    }

    @Test
    fun withoutSpeedsTheyAreHalfOfTheCores() {
        assertEquals(4, fastCores(File(folder, "nothing"), 8))
        assertEquals(1, fastCores(cpus(emptyMap()), 1))
        assertEquals(3, fastCores(speeds("cpu_capacity"), 5))
        assertEquals(2, fastCores(cpus(mapOf("cpu_capacity" to "?"), mapOf("cpu_capacity" to 1024)), 4), "one is not known")
    }

    private class Warm : Device {
        override var heat = 0
        val passes = ArrayList<Pair<String, Int>>()

        override fun passed(graph: String, tokens: Int, nanoseconds: Long) {
            assertTrue(nanoseconds >= 0)
            passes.add(graph to tokens)
        }
    }

    private object NoGraph : BoundGraph {
        override fun bind(cache: Map<String, Tensor>) = Unit
        override fun run(inputs: Map<String, Tensor>) = emptyMap<String, Tensor>()
        override fun close() = Unit
    }

    @Test
    fun aDeviceKnowsOfPassesAndWhenItsHeatChangesCostsAreMeasuredAnew() {
        val device = Warm()
        val costs = Costs(2)
        val watch = Watch(device, costs)
        val graphs = watch.watched(mapOf("target" to NoGraph, "drafter" to NoGraph))
        fun run(graph: String, tokens: Long) = graphs.getValue(graph).run(mapOf("embedded" to Tensor(floats(6), tokens, 6 / tokens)))
        for (drafts in 0..2) repeat(2) { costs.record(drafts, 1.0, 0.5) }
        run("target", 3)
        run("drafter", 1)
        assertEquals(listOf("target" to 3, "drafter" to 1), device.passes)
        assertEquals(null to true, costs.nextToMeasure(2) to watch.cool)
        device.heat = 2
        run("target", 1)
        assertEquals(0 to false, costs.nextToMeasure(2) to watch.cool)
        assertEquals(null, costs.stepSeconds)
        costs.record(0, 2.0)
        run("target", 1)
        assertEquals(2.0, costs.verifySeconds(0))
        device.heat = 0
        run("target", 1)
        assertTrue(watch.cool)
    }

    @Test
    fun allKeysAndValuesAreInTheMemoryOfTheDevice() {
        var bytes = 0L
        val allocate = { count: Long -> direct(count).also { bytes += count } }
        val bundle = FakeBundle(folder, allocate = allocate)
        val decoder = Decoder(bundle.engine, null, null, DraftLength(5, Costs(5, 2)), allocate = allocate)
        val conversation = decoder.conversation()
        for (stream in listOf(decoder.stream(PROMPT.toIntArray(), Options(4)), conversation.stream(PROMPT.toIntArray(), Options(4)))) {
            val before = bytes
            stream.forEach { _ -> }
            assertTrue(bytes > before)
        }
        val file = File(folder, "session").also(conversation::save)
        val before = bytes
        readSession(file, bundle.manifest, DraftLength(5, Costs(5, 2)), allocate, mapped = false)
        assertEquals(conversation.numBytes, bytes - before)
    }

    @Test
    fun aProcessOf32BitsIsRefused() {
        for (architecture in listOf("aarch64", "x86_64", "amd64")) requireWideProcess(folder, architecture)
        for (architecture in listOf("armv8l", "armv7l", "i686")) {
            val line = assertFailsWith<InputError> { requireWideProcess(folder, architecture) }.message.orEmpty()
            assertTrue(architecture in line && "expected 64" in line, line)
        }
    }
}
