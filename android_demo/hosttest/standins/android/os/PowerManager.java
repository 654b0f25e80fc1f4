package android.os;

/** A phone as warm as a test says; it counts how often it was asked. */
public final class PowerManager {
    public float headroom;
    public int asked;

    public float getThermalHeadroom(int forecastSeconds) {
        asked++;
        return headroom;
    }
}
